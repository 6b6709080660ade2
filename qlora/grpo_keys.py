"""The keys of [train] that only objective = "grpo" reads: what an answer is worth, how answers are drawn, and the step.

Names and defaults are those of TRL's GRPOConfig where it has them; what they mean stands in DeepSeekMath (2402.03300,
section 4.1) and DAPO (2503.14476, section 3). A reward in a recipe is one of three that run no code of anybody's:
Python functions are named on the command line, never here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qlora import linear_regex
from qlora.recipe_values import Section, Text, once_each

BUILT_IN = ("exact_match", "regex", "json_schema")
SCHEMA = "json_schema:"
# Of a pattern's length times its counted repetitions: what matches a thousand characters in a millisecond.
MAX_PATTERN_COST = 10_000
KL_BETA = 0.04  # DeepSeekMath, section 4.2; TRL has 0
# Formats whose rows are a question with one right answer.
FORMATS = ("grpo", "messages", "prompt-completion", "alpaca", "sharegpt")


def _known(reward: str) -> str:
    """The reward. Raises ValueError for what is none of those that a recipe can name."""
    kind, colon, rest = reward.partition(":")
    if kind not in BUILT_IN or (kind == "exact_match") == bool(colon) or (kind != "exact_match" and not rest):
        ways = 'known are "exact_match", "regex:PATTERN" and "json_schema:FILE"'
        if kind.endswith(".py") or rest.partition(":")[0].endswith(".py"):
            raise ValueError(f"a recipe runs no code: give {reward[:80]!r} on the command line, as `rewards`; {ways}")
        near = difflib.get_close_matches(kind, BUILT_IN, 1, 0.6)
        raise ValueError(f"unknown reward {reward[:80]!r}{f', did you mean {near[0]!r}?' if near else ''}; {ways}")
    if kind == "regex":
        if linear_regex.cost(rest) > MAX_PATTERN_COST:
            raise ValueError(f"the pattern of {reward[:80]!r} is too large to be matched with every answer")
        try:
            linear_regex.engine(rest)
        except linear_regex.UnsafePatternError as error:
            raise ValueError(f"the pattern of {reward[:80]!r} cannot be matched safely ({error})") from error
    return reward


Reward = Annotated[Text, AfterValidator(_known)]
Weight = Annotated[float, Field(ge=-1000, le=1000)]


class GrpoKeys(Section):
    """How answers are drawn, judged and learnt from."""

    rewards: Annotated[tuple[Reward, ...], AfterValidator(once_each)] = Field(
        (),
        max_length=32,
        description='grpo: what an answer is worth, 1 or 0 each: "exact_match" with the row\'s answer, "regex:PATTERN" '
        'found in it, "json_schema:FILE"; functions in Python are named on the command line alone',
    )
    reward_weights: tuple[Weight, ...] | None = Field(
        None, max_length=64, description="grpo: what each reward counts, those of the command line last (1 each)"
    )
    reward_timeout: float = Field(
        60.0, gt=0, le=86_400, description="grpo: seconds that a Python function may take for all answers of a call"
    )
    num_generations: int = Field(
        8, ge=2, le=1024, description="grpo: answers drawn to each row, which are compared with each other"
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="grpo: answers are drawn from, and learnt at, probabilities of this temperature"
    )
    max_completion_length: int = Field(
        256, ge=1, le=1 << 20, description="grpo: longest answer that is drawn, in tokens"
    )
    num_iterations: int = Field(1, ge=1, le=64, description="grpo: steps that are taken on the answers of one drawing")
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="grpo: how far a token's probability may move from its drawing and still be learnt"
    )
    epsilon_high: float | None = Field(
        None, gt=0, le=100, description="grpo: epsilon upwards, where it is another (DAPO: 0.28)"
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo",
        description="grpo: every answer counts the same, dapo: every token, dr_grpo: every token, over "
        "max_completion_length",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="grpo: advantages are divided by the deviation of the row's rewards, of the whole step's, or not",
    )
    mask_truncated_completions: bool = Field(
        False, description="grpo: do not learn from answers that max_completion_length has cut"
    )

    @model_validator(mode="after")
    def _go_together(self) -> GrpoKeys:
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError("epsilon_high is the upper side of epsilon, and not below it")
        if self.reward_weights is not None and len(self.reward_weights) < len(self.rewards):
            what = f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards"
            raise ValueError(f"{what}: give one for each")
        return self

    @property
    def clip(self) -> tuple[float, float]:
        """How far the ratio of probabilities may fall and rise (DAPO, equation 8)."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high


KEYS = tuple(GrpoKeys.model_fields)
DEFAULTS = {key: field.default for key, field in GrpoKeys.model_fields.items()}


def idle(recipe: Any) -> dict[str, Any]:
    """What a recipe does not write out: keys of grpo, and of documents, where it has another objective, or none."""
    of_train = {} if recipe.train.objective == "grpo" else {"train": set(KEYS)}
    return of_train if recipe.data.documents else {**of_train, "study": True, "exam": True}


def schema_file(reward: str) -> str | None:
    """The path in a reward that names a file."""
    return reward.removeprefix(SCHEMA) if reward.startswith(SCHEMA) else None


def with_paths(train: Any, placed: Callable[[str, tuple[int | str, ...]], str]) -> dict[str, Any]:
    """The change of a recipe whose [train] has schemas in files: each path as `placed(path, key)`."""
    if not any(map(schema_file, train.rewards)):
        return {}
    rewards = tuple(
        f"{SCHEMA}{placed(file, ('train', 'rewards', number))}" if (file := schema_file(reward)) else reward
        for number, reward in enumerate(train.rewards)
    )
    return {"train": train.model_copy(update={"rewards": rewards})}


def without_places(rewards: list[str]) -> list[str]:
    """Rewards, for a comparison, without where local files lie: what they hold is compared (`rewards.record`)."""
    return [f"{SCHEMA}local" if (file := schema_file(reward)) and os.path.isabs(file) else reward for reward in rewards]


def given(keys: Mapping[str, Any]) -> list[str]:
    """Those of the keys whose value is another than the default."""
    return [key for key in KEYS if keys[key] != DEFAULTS[key]]


def cross_checks(recipe: Any) -> Iterator[tuple[bool, str, str, str]]:
    """What does not go together in a recipe of grpo; as `objective_keys.cross_checks`."""
    train, data = recipe.train, recipe.data
    yield (
        train.max_completion_length >= data.max_length,
        "train.max_completion_length",
        f"train.max_completion_length ({train.max_completion_length}) leaves no room for a question within "
        f"data.max_length ({data.max_length})",
        "question and answer share data.max_length tokens: lower the one, or raise the other",
    )
    yield (
        train.neftune_alpha > 0,
        "train.neftune_alpha",
        'train.neftune_alpha, and train.objective = "grpo" compares probabilities with those of the drawing',
        "noise would be taken for a change of the model: take it out",
    )
