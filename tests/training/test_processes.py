"""What process 0 asks of the others, and what comes of what they show: in one process, with a channel made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora.dealing import Cut
from qlora.errors import DoesNotFit, RecipeError, TrainingStopped
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.step.loss import SupervisedObjective
from qlora.stop import StopAsked, StopRequest
from qlora.training import processes
from qlora.training.checkpoint import RunState
from qlora.training.dividing import NO_MEMORY, STOP
from qlora.training.memory_plan import MemorySettings
from qlora.training.processes import Leader, Partners
from qlora.training.sharing import Sharing
from tests.runs import write_recipe
from tests.training.cases import optimizer
from tests.training.wires import Wire

SETTINGS = MemorySettings(1, False)
LENGTHS = [64] * 5  # of the packs of a step


def leader(wire: Wire) -> tuple[Leader, StopRequest, list[str]]:
    stop, kept = StopRequest(), []
    made = Leader(wire, optimizer(), stop, lambda: kept.append("saved"))  # type: ignore[arg-type]
    made._sharing = Sharing.of(SETTINGS, 2, recipe_of_base("owner/name"), Recorder())
    return made, stop, kept


def losses(_: Cut | None = None) -> list[Tensor]:
    return [torch.tensor(2.0), torch.tensor(0.0)]


def test_alone_there_is_nobody_to_wait_for() -> None:
    made = optimizer()
    alone = processes.of_run(made, StopRequest(), lambda: None, SupervisedObjective())
    assert type(alone) is Partners and alone.mine(0) and alone.mine(7)
    assert alone.gather(RunState(), LENGTHS, SETTINGS, losses) == losses()
    alone.update(1e-3)
    alone.end()


def test_micro_batches_are_dealt_in_turn_and_gradients_added_up() -> None:
    first, _, _ = leader(wire := Wire())
    dealt: list[bool] = []

    def work(_: Cut) -> list[Tensor]:
        dealt.extend(first.mine(j) for j in range(5))
        first.optimizer.add_gradient(next(iter(first.optimizer.masters)), torch.full((4, 8), 3.0))
        return losses()

    assert [float(loss) for loss in first.gather(RunState(step=1), LENGTHS, SETTINGS, work)] == [3.0, 1.0]
    assert dealt == [True, False, True, False, True] and all(first.mine(j) for j in range(5))
    assert wire.words == ["state", "step"] and len(wire.added) == 2  # one sum of gradients, one of losses
    found = [float(gradient.flatten()[0]) for gradient in first.optimizer.gradients.values()]
    assert found == [4.0, 1.0, 1.0, 1.0]
    first.update(1e-3)
    first.end()
    first.end()
    assert wire.words == ["state", "step", "update", "end"] and not wire.is_open


def test_what_nobody_has_a_gradient_of_is_left_alone_and_nothing_old_is_summed() -> None:
    first, _, _ = leader(wire := Wire(its=0))
    names = list(first.optimizer.masters)

    def work(_: Cut) -> list[Tensor]:
        first.optimizer.add_gradient(names[1], torch.full((4, 8), 3.0))
        return losses()

    first.gather(RunState(step=1), LENGTHS, SETTINGS, work)
    assert list(first.optimizer.gradients) == [names[1]]
    assert float(wire.added[0].abs().sum()) == 4 * 8 * 3.0  # the other three held the last step's


def test_memory_that_ran_out_there_is_memory_that_ran_out_here() -> None:
    first, _, kept = leader(Wire(NO_MEMORY))
    with pytest.raises(torch.OutOfMemoryError, match="process 1 of 2"):
        first.gather(RunState(step=1), LENGTHS, SETTINGS, losses)
    assert kept == [] and first.mine(1)


def test_memory_that_ran_out_here_is_shown_before_it_is_raised() -> None:
    first, _, _ = leader(wire := Wire())

    def work(_: Cut) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")

    with pytest.raises(torch.OutOfMemoryError, match=r"process 0 of 2.*1\.00 MiB"):
        first.gather(RunState(step=1), LENGTHS, SETTINGS, work)
    assert wire.asked == 2 and wire.added == []


def test_a_stop_asked_of_one_stops_all() -> None:
    first, stop, _ = leader(Wire(STOP))
    with pytest.raises(StopAsked):
        first.gather(RunState(step=1), LENGTHS, SETTINGS, losses)
    assert stop.signal_number == 15
    first, stop, _ = leader(wire := Wire())

    def work(_: Cut) -> list[Tensor]:
        raise StopAsked

    with pytest.raises(StopAsked):
        first.gather(RunState(step=1), LENGTHS, SETTINGS, work)
    assert wire.asked == 2  # the other one was not left waiting


@pytest.mark.parametrize(("code", "error"), [(3, DoesNotFit), (4, TrainingStopped), (1, TrainingStopped)])
def test_a_failure_there_is_named_and_what_is_done_is_saved(code: int, error: type[Exception]) -> None:
    first, _, kept = leader(Wire(code))
    with pytest.raises(error, match=f"process 1 of 2 has failed with exit code {code}"):
        first.gather(RunState(step=1), LENGTHS, SETTINGS, losses)
    assert kept == ["saved"]


def test_what_is_not_built_is_refused_by_name(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tmp_path / "base")
    shards = "memory.shard_weights=true"
    processes.refuse_unbuilt(load_recipe(path, [shards]))
    with path.open("a") as file:
        file.write('[[data.documents]]\npath = "manuals"\n')
    processes.refuse_unbuilt(load_recipe(path))
    with pytest.raises(RecipeError, match="not built with documents"):
        processes.refuse_unbuilt(load_recipe(path, [shards]))
