"""How many prompts a run asks at once, and to what: as many as there is memory for, where the step itself fits."""

from __future__ import annotations

from dataclasses import replace

from qlora.memory.asking import Asked, half, halved, most_rows
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import TRAIN_PHASES, Workload
from qlora.model.generate import ANSWERS_AT_ONCE
from qlora.recipe.reading import Recipe


def asking(workload: Workload, simulator: Simulator, limit: int) -> Workload:
    """With as many prompts at once as there is memory for: a study asks fewer where it runs out."""
    while most_rows(workload.asks) > 1:
        simulation = simulator.run(workload)
        highest = simulation.peak_of([phase for phase, _ in workload.asks]).total
        if highest <= max(limit, simulation.peak_of(TRAIN_PHASES).total):
            break
        workload = replace(workload, asks=halved(workload.asks))
    return workload


def drawing(workload: Workload, simulator: Simulator, limit: int) -> Workload:
    """With as many answers drawn at once as there is memory for."""
    while workload.draws is not None and workload.draws.rows > 1:
        simulation = simulator.run(workload)
        if simulation.phases["draw"].total <= max(limit, simulation.peak_of(TRAIN_PHASES).total):
            break
        workload = replace(workload, draws=half(workload.draws))
    return workload


def draws_of(recipe: Recipe, asked_tokens: int | None, batch: int | None) -> Asked | None:
    """A batch of answers that GRPO draws, as long as they may be, to the longest prompt; None of other objectives.

    Prompt and answer share a row of `data.max_length`; where no rows are known, they fill it. The longest prompt may
    have a short one beside it, whose answer has all the room that there can be. `batch`: answers of a step, where that
    is known.
    """
    train, most = recipe.train, recipe.data.max_length
    if train.objective != "grpo":
        return None
    wanted = min(train.max_completion_length, most - 1)
    asked = min(asked_tokens or most - wanted, most - 1)
    return Asked(min(ANSWERS_AT_ONCE, batch or ANSWERS_AT_ONCE), 0, asked, wanted, drawn=1)
