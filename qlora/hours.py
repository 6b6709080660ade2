"""What a run with documents will take before anything of it is done: hours, and memory by phase.

Hours follow from what will be asked, how much of it (two amounts: `study/amount.py`), and how fast the machine is
(`memory/speed.py`). They are a range, and an early one: once the first passage is done, the run says when its study
ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.study import amount
from qlora.study.amount import Amount, Documents
from qlora.study.room import Batches, kv_bytes

if TYPE_CHECKING:
    from qlora.memory.estimate import Estimate, Estimator

Range = tuple[float, float]  # seconds, the least and the most that are likely


@dataclass(frozen=True)
class Hours:
    """Seconds of each part of a run, `where` it was reckoned for. `limited`: the study ends by study.max_minutes."""

    study: Range
    exam: Range
    training: Range
    where: str
    limited: bool


@dataclass(frozen=True)
class Ahead:
    """What is to come; None where the base cannot be simulated. `memory`: bytes, as `Estimate.as_dict` names them."""

    hours: Hours | None
    memory: Mapping[str, Any] | None


def hours_of(recipe: Recipe, documents: Documents, decides_length: bool, estimator: Estimator) -> Hours:
    """Of a run on the estimator's machine; without a card, on this processor."""
    from qlora.memory import speed

    values, text, machine = estimator.values(recipe), estimator.text, estimator.machine
    head = int(text.vocab_size) * int(text.hidden_size)
    size = speed.Size(int(text.num_hidden_layers), values.linear, head, kv_bytes(text, 1))
    fast, limit = speed.of_machine(machine), recipe.study.max_minutes
    ways = amount.amounts(recipe, documents, decides_length)

    def lasts(part: str, most: float = float("inf")) -> Range:
        least, longest = (min(most, speed.seconds(fast, size, _work(way, part))) for way in ways)
        return round(least, 3), round(longest, 3)

    study = lasts("study", float("inf") if limit is None else 60 * limit)
    where = "on this processor with nothing else to do" if machine.gpu is None else f"on {machine.gpu.label}"
    limited = limit is not None and study[1] >= 60 * limit
    return Hours(study, lasts("exam"), lasts("training"), where, limited)


def _work(way: Amount, part: str) -> tuple[float, float, float, float]:
    work: amount.Work = getattr(way, part)
    return work.parts


def ahead(
    recipe: Recipe, config: Mapping[str, Any], asks: Batches, documents: tuple[Documents, bool], sink: Sink
) -> Ahead:
    """Of a recipe on this machine; `config` is the base's config.json, `asks` what is asked at once, `documents` what
    is known of them and whether they decide how long is trained."""
    from qlora.memory import hardware
    from qlora.memory.estimate import Estimator
    from qlora.memory.question import Question
    from qlora.model.meta_model import text_config

    machine = hardware.this_machine(recipe.memory.limit)
    text, _ = text_config(config, recipe.model.base)
    estimator = Estimator(text, recipe.model.base, machine)
    estimator.asks = asks
    try:
        estimate = Question(recipe, estimator).estimate()
    except ModelError as error:
        sink.emit(Notice("memory", f"hours and memory to come are not known: {error.what}"))
        return Ahead(None, None)
    return Ahead(hours_of(recipe, *documents, estimator), memory_of(estimate, machine.source))


def memory_of(estimate: Estimate, source: str) -> dict[str, Any]:
    """What a screen shows of an estimate; `source` says where its limit comes from."""
    whole = estimate.as_dict()
    keys = ("peak_bytes", "error_bytes", "limit_bytes", "fits", "phases")
    return {**{key: whole[key] for key in keys}, "limit_source": source}
