"""What drawn answers are worth: every reward asked for all of them, and the sum by its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from qlora import linear_regex
from qlora.events import Notice, Sink
from qlora.recipe.sections import TrainSection
from qlora.rewards.child import RewardChild
from qlora.rewards.compare import same_answer, without_thoughts
from qlora.rewards.sources import RewardSource
from qlora.shown import one_line

Row = Mapping[str, Any]
Judge = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


class Questions(Protocol):
    """The part of a prepared split that is looked at."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def prompt(self, index: int) -> Any: ...


TRIED_ROWS = 20  # whose own answers are judged before anything is drawn
_SHOWN = 200


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run, in the order of the recipe and then of the command line; open while `opened` is."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    judges: tuple[Judge, ...]

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[list[float]]:
        """What each answer is worth to each reward: a list for each of `names`, of a number for each completion.

        `prompts` and `rows` (see `row_of`) are those that the completions answer, as many of them. Raises RewardError.
        """
        asked = list(prompts), list(completions), [dict(row) for row in rows]
        assert len(asked[0]) == len(asked[1]) == len(asked[2])
        return [judge(*asked) for judge in self.judges]

    def total(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """The sum of each completion's scores, each by its weight."""
        return [sum(map(float.__mul__, self.weights, map(float, of_one))) for of_one in zip(*scores, strict=True)]


def row_of(messages: Sequence[Mapping[str, Any]], expected: str, columns: Row | None) -> tuple[str, dict[str, Any]]:
    """A question as rewards see it: the last that the user said, and the row: its columns, `messages` and `answer`."""
    asked = next((message["content"] for message in reversed(messages) if message.get("role") == "user"), "")
    return str(asked or ""), {**(columns or {}), "messages": list(messages), "answer": expected}


@contextmanager
def opened(train: TrainSection, sources: Sequence[RewardSource], sink: Sink) -> Iterator[Rewards | None]:
    """The rewards of a run, their processes running inside the block; None of a run without. Raises RewardError."""
    if not sources:
        yield None
        return
    with ExitStack() as stack:
        judges = tuple(_judge(source, train.reward_timeout, sink, stack) for source in sources)
        weights = train.reward_weights or (1.0,) * len(sources)
        yield Rewards(tuple(one_line(source.name) for source in sources), weights, judges)


def _judge(source: RewardSource, seconds: float, sink: Sink, stack: ExitStack) -> Judge:
    if source.path is None:
        kind, _, pattern = source.name.partition(":")
        return _matching if kind == "exact_match" else _found(pattern)
    if source.function is None:
        what = {"schema": json.loads(source.data)}
        child = RewardChild(source.name, what, seconds, f"mend {source.path}")
        stack.callback(child.close)
        return lambda prompts, completions, rows: child.score([], [without_thoughts(one) for one in completions], [])
    what = {"file": str(source.path), "source": source.data.decode(), "function": source.function}
    hint = "mend it and start anew: a run goes on only with the file that it began with (mode='fresh')"
    child = RewardChild(source.name, what, seconds, hint)
    stack.callback(child.close)
    return _told(child, sink)


def _matching(_prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [float(same_answer(given, str(row["answer"]))) for given, row in zip(completions, rows, strict=True)]


def _found(pattern: str) -> Judge:
    engine = linear_regex.engine(pattern)
    return lambda prompts, completions, rows: [
        float(engine.isinstance_python(without_thoughts(given))) for given in completions
    ]


def _told(child: RewardChild, sink: Sink) -> Judge:
    """A function's judgement; what it prints is said once."""
    said: list[str] = []

    def judge(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
        scores = child.score(prompts, completions, rows)
        if (printed := child.printed()) and not said:
            said.append(printed)
            short = printed[:_SHOWN] + ("…" if len(printed) > _SHOWN else "")
            sink.emit(Notice("rewards", f"{child.name} prints, which is said this once: {short}"))
        return scores

    return judge


def try_on(rewards: Rewards | None, split: Questions, sink: Sink) -> None:
    """Judge the rows' own answers before any is drawn: what a function does wrong shows now, and a reward that thinks
    nothing of right answers too. Raises RewardError.
    """
    questions = [split.prompt(row) for row in range(min(len(split.lengths), TRIED_ROWS))]
    asked = [row_of(one.messages, one.expected, one.columns) for one in questions if one is not None]
    if rewards is None or not asked:
        return
    prompts, rows = [prompt for prompt, _ in asked], [row for _, row in asked]
    scores = rewards.score(prompts, [str(row["answer"]) for row in rows], rows)
    means = [sum(of_one) / len(of_one) for of_one in scores]
    worth = ", ".join(f"{name} {mean:.3g}" for name, mean in zip(rewards.names, means, strict=True))
    sink.emit(Notice("rewards", f"of {len(rows)} rows, the rows' own answers are worth: {worth}", len(rows)))
