"""The keys of [train] that say what a step minimizes, and which rows each objective learns from.

Supervised rows show an answer; preference rows show a better and a worse one (`preference`), or one answer and whether
it is a good one (`kto`). No objective can learn from the rows of another: that is refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

from pydantic import Field, model_validator

from qlora import grpo_keys
from qlora.grpo_keys import GrpoKeys

R = TypeVar("R")  # a recipe, which stands on a higher floor
OBJECTIVES = ("sft", "dpo", "ipo", "orpo", "simpo", "kto", "grpo")
WITH_REFERENCE = ("dpo", "ipo", "kto")  # grpo unless beta is 0; the others compare nothing with the model as it was
JUDGED = ("preference", "kto")  # formats whose rows say how good an answer is
# Where the recipe gives none: DPO and IPO as TRL sets it (the papers try 0.1 to 0.5 and 0.01 to 1), ORPO's lambda as
# of the paper's Mistral models (2403.07691, section 6.1), KTO's as of its section 4 (2402.01306), SimPO's 2.0 with a
# margin of half of it (2405.14734, appendix B: 2.0 to 2.5, and a ratio of 0.5 as its authors advise to begin with).
BETAS = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1, "grpo": grpo_keys.KL_BETA}
_OF_ROWS = {"sft": "auto", "kto": "kto", "grpo": "grpo"}  # the format of each objective; the others' is preference
GAMMA = 1.0
_LEARNT = {"kto": "answers marked good or bad", "grpo": "questions with a right answer"}
# Peak learning rates where the recipe gives none: what LoRA wants is about ten times that of training all weights
# (Schulman et al. 2025, "LoRA Without Regret"), of which the papers have 1e-6 (DPO, 2305.18290, appendix B; IPO as DPO;
# SimPO 3e-7 to 1e-6, 2405.14734, appendix B; KTO as TRL has it, and its flat ends ask for no more) and 8e-6 (ORPO,
# 2403.07691, appendix C); GRPO has 1e-6 (2402.03300, section 4.2). TRL's and LLaMA-Factory's LoRA examples have 5e-6
# for all but ORPO. At SFT's 2e-4 a model of natural language drifts far from its reference within a few steps.
LEARNING_RATES = {"sft": 2e-4, "dpo": 1e-5, "ipo": 1e-5, "orpo": 8e-5, "simpo": 1e-5, "kto": 1e-5, "grpo": 1e-5}


def usual_rate(section: Mapping[str, Any]) -> float:
    """The peak learning rate of a [train] with these keys, which names none."""
    return LEARNING_RATES[section.get("objective", "sft")]


class ObjectiveKeys(GrpoKeys):
    """What a step minimizes."""

    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto", "grpo"] = Field(
        "sft",
        description="sft learns answers; dpo, ipo, orpo and simpo from pairs of a better and a worse answer, kto from "
        "answers marked good or bad, grpo from answers of its own, which rewards judge",
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Strength of the objective (0.1; simpo 2.0): beta, ipo's tau, orpo's lambda; grpo: of staying near "
        "the model as it was (0.04; 0 is off)",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: share of pairs that are taken to be swapped")
    sft_weight: float | None = Field(
        None, ge=0, le=1000, description="Loss of the better answers beside that of pairs, a token (0; orpo 1)"
    )
    simpo_gamma: float | None = Field(
        None, ge=0, le=1000, description="simpo: margin between the two answers' rewards (1.0)"
    )
    desirable_weight: float | None = Field(
        None, gt=0, le=1000, description="kto: weight of each good answer; where bad ones are many, bad ÷ good (1.0)"
    )
    undesirable_weight: float | None = Field(
        None, gt=0, le=1000, description="kto: weight of each bad answer; where good ones are many, good ÷ bad (1.0)"
    )

    @property
    def strength(self) -> float:
        """Beta, as given or as its objective's paper has it."""
        return self.beta if self.beta is not None else BETAS[self.objective]

    @property
    def of_answers(self) -> float:
        """The weight of the better answers' own loss; ORPO's is a part of its loss (2403.07691, equation 6)."""
        return self.sft_weight if self.sft_weight is not None else float(self.objective == "orpo")

    @property
    def margin(self) -> float:
        return self.simpo_gamma if self.simpo_gamma is not None else GAMMA

    @property
    def of_good(self) -> float:
        """Lambda of KTO's good answers; its paper wants good · of_good ÷ (bad · of_bad) of 1 to 4/3 (section 4.2)."""
        return self.desirable_weight if self.desirable_weight is not None else 1.0

    @property
    def of_bad(self) -> float:
        return self.undesirable_weight if self.undesirable_weight is not None else 1.0

    @property
    def needs_reference(self) -> bool:
        return self.objective in WITH_REFERENCE or (self.objective == "grpo" and self.strength > 0)

    @property
    def answers_per_row(self) -> int:
        """Rows of tensors that a row of data becomes in a step."""
        return self.num_generations if self.objective == "grpo" else 1

    @model_validator(mode="after")
    def _all_are_read(self) -> ObjectiveKeys:
        """A key that the objective does not read would do nothing in silence."""
        given = {
            "beta": (self.beta is not None, OBJECTIVES[1:]),
            "label_smoothing": (self.label_smoothing != 0, ("dpo",)),
            "sft_weight": (self.sft_weight is not None, ("dpo", "ipo", "orpo", "simpo")),
            "simpo_gamma": (self.simpo_gamma is not None, ("simpo",)),
            **dict.fromkeys(grpo_keys.given(dict(self)), (True, ("grpo",))),
            "desirable_weight": (self.desirable_weight is not None, ("kto",)),
            "undesirable_weight": (self.undesirable_weight is not None, ("kto",)),
        }
        if self.beta == 0 and self.objective in OBJECTIVES[1:-1]:
            raise ValueError(f'beta = 0 leaves nothing of objective = "{self.objective}" (only grpo may have it)')
        for key, (is_given, readers) in given.items():
            if is_given and self.objective not in readers:
                raise ValueError(f'objective = "{self.objective}" does not read {key} (it is for {", ".join(readers)})')
        return self


def settled(given: R) -> R:
    """The recipe whose sources of format "auto" are read as the objective needs them; a supervised one as it is."""
    recipe: Any = given
    if recipe.train.objective == "sft":
        return given
    meant = {"auto": _OF_ROWS.get(recipe.train.objective, "preference")}
    sides: dict[str, Any] = {
        side: tuple(one.model_copy(update={"format": meant.get(one.format, one.format)}) for one in sources)
        for side in ("train", "eval")
        if (sources := getattr(recipe.data, side))
    }
    if recipe.train.objective == "grpo":
        sides["packing"] = (
            False  # of answers, which are not known beforehand; and of rows that they are measured beside
        )
    data = recipe.data.model_copy(update=sides)
    return cast(R, recipe.model_copy(update={"data": data})) if sides else given


def cross_checks(recipe: Any) -> Iterator[tuple[bool, str, str, str]]:
    """Rows that the objective cannot learn from: whether it is so, the key, what is wrong, and what to do."""
    data, objective = recipe.data, recipe.train.objective
    allowed = {"sft": (), "kto": JUDGED, "grpo": grpo_keys.FORMATS}.get(objective, ("preference",))
    for side in ("train", "eval"):
        for number, source in enumerate(getattr(data, side)):
            key, named = f"data.{side}.{number}.format", f'data.{side} has rows of format "{source.format}"'
            if objective == "sft":
                hint = 'set objective = "dpo" under [train] (or "ipo", "orpo", "simpo", "kto")'
                own = source.format in ("kto", "grpo")
                hint = f'set objective = "{source.format}" under [train]' if own else hint
                what = f'{named}, and train.objective = "sft" learns from answers alone'
                yield source.format in (*JUDGED, "grpo"), key, what, hint
            else:
                pairs = _LEARNT.get(objective, "pairs of a better and a worse answer")
                hint = f"take format out, or set it to {' or '.join(map(repr, allowed))}".replace("'", '"')
                what = f'{named}, and train.objective = "{objective}" learns from {pairs}'
                yield source.format not in ("auto", *allowed), key, what, hint
    if objective == "sft":
        return
    yield (
        data.loss_on != "assistant",
        "data.loss_on",
        f'data.loss_on = "all", and train.objective = "{objective}" compares answers alone',
        'set data.loss_on = "assistant", or take it out',
    )
    yield (
        bool(data.documents),
        "data.documents",
        f'[[data.documents]] are learnt by heart, which train.objective = "{objective}" cannot do',
        'learn them with objective = "sft" first, then name that run in lora.from',
    )
    if objective == "grpo":
        yield from grpo_keys.cross_checks(recipe)
