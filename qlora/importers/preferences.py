"""Goals of preference that other trainers name: dpo, ipo, orpo, simpo and kto, with the keys of theirs that are ours.

A goal is known before any other key is looked at (`settle` of each trainer), since it decides what these mean. What no
objective of ours is, is refused by name: importing it as supervised learning would train something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn

from qlora.errors import UserError
from qlora.importers.draft import Draft, Rule, as_shown, carried
from qlora.importers.values import number

KEY = "train.objective"
PAIRS = ("dpo", "ipo", "orpo", "simpo")
OBJECTIVES = (*PAIRS, "kto")
# Names of DPOTrainer's and CPOTrainer's `loss_type`, and of LLaMA-Factory's `pref_loss`, that are objectives of ours.
LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
# TRL's DPOConfig, CPOConfig, ORPOConfig and KTOConfig have this beta, and CPOConfig this margin and this weight of the
# better answers' own loss; LLaMA-Factory has the same beta and margin.
BETA, GAMMA, CPO_ALPHA = 0.1, 0.5, 1.0
OF_TOKENS = "a mean over a batch's tokens there, over its answers here"
OF_QUESTIONS = "the part that imitates is of the better answer alone here, as in its paper; of the question too there"
REFERENCE = "what is compared with is the base, or the adapter of lora.from, without a second model"


def refuse(key: str, value: Any, hint: str = "") -> NoReturn:
    """Raises UserError for what is neither imitating answers nor an objective of ours."""
    what = f"{key} = {as_shown(key, value)}: the configuration asks for another goal than those that are built"
    raise UserError(what, hint or f"supervised fine-tuning, {', '.join(PAIRS)} and kto are what can be imported")


def goal(draft: Draft) -> str:
    return str(draft.values.get(KEY, "sft"))


def begin(draft: Draft, key: str, objective: str, beta: tuple[str, Any] | None) -> None:
    """The objective that `key` has decided, and its strength: a key with its value, or their default."""
    draft.carry(key, KEY, objective)
    named, value = beta or ("beta", BETA)
    carried("train.beta", number, "" if beta else "not set: its default")(draft, named, value)


def named_loss(key: str, value: Any) -> str:
    """The objective of a `loss_type`, which may be a list of one."""
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(name, str) or name not in LOSSES:
        refuse(key, value, f"losses that are built: {', '.join(LOSSES)}")
    return LOSSES[name]


def of(readers: Collection[str], to: str, convert: Callable[[Any], Any] = number, note: str = "") -> Rule:
    """For a key that some objectives read; beside others it says nothing there, nor here."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if goal(draft) in readers:
            carried(to, convert, note)(draft, key, value)
        else:
            draft.ours(key, f"read for {', '.join(readers)} alone")

    return rule


def not_of(why: str, rule: Rule) -> Rule:
    """For a key that supervised learning alone reads here."""
    return lambda draft, key, value: rule(draft, key, value) if goal(draft) == "sft" else draft.ours(key, why)


def more_of_answers(draft: Draft, key: str, value: Any) -> None:
    """A weight of the better answers' own loss, a token, that is added to the objective's: ORPO has one of 1 itself."""
    if goal(draft) not in PAIRS:
        draft.leave(key, value, "of marked answers none is imitated here")
        return
    own = 1.0 if goal(draft) == "orpo" else 0.0
    carried("train.sft_weight", lambda said: own + number(said))(draft, key, value)


WEIGHTS = {
    "desirable_weight": of(("kto",), "train.desirable_weight"),
    "undesirable_weight": of(("kto",), "train.undesirable_weight"),
}
ANSWERS_ALONE = "answers alone are compared"
