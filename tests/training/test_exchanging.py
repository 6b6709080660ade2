"""What the processes of a run exchange: codes with a hash of their weights, gradients and figures, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.errors import TrainingStopped
from qlora.objective_keys import ObjectiveKeys
from qlora.processes import Place
from qlora.step.objectives import objective_of
from qlora.training.dividing import FINE
from qlora.training.exchanging import Sums, add_up, bytes_of_step, copy_weights, shown
from tests.training.cases import optimizer
from tests.training.wires import Wire


def test_weights_are_compared_now_and_then() -> None:
    wire: Any = Wire(digest=5)
    with pytest.raises(TrainingStopped, match="step 200: the weights of process 1 are not those of process 0"):
        shown(wire, optimizer(), FINE, 200)
    wire.digest = None
    shown(wire, optimizer(), FINE, 201)


@pytest.mark.parametrize(("objective", "width"), [("sft", 0), ("dpo", 9), ("grpo", 4)])
def test_a_step_adds_up_as_many_bytes_as_is_said(objective: Any, width: int) -> None:
    """Process 1 adds ones; a process that had no micro-batch has seen nothing, and adds zeros."""
    made, wire, losses = optimizer(), Wire(), torch.zeros(5)
    sums = Sums.of(objective_of(ObjectiveKeys(objective=objective)))
    assert (sums is None) == (not width)
    for _ in range(2 if sums else 0):
        assert sums is not None
        sums.seen.append(torch.ones(width, dtype=torch.float64))
    add_up(wire, made, losses, torch.ones(4, dtype=torch.int64), sums)
    assert sum(values.nbytes for values in wire.added) == bytes_of_step(made, 5, sums)
    assert losses.tolist() == [1.0] * 5
    assert sums is None or [one.tolist() for one in sums.seen] == [[3.0] * width]
    nothing = Sums([], 3)
    add_up(wire, made, losses, torch.ones(4, dtype=torch.int64), nothing)
    assert [one.tolist() for one in nothing.seen] == [[1.0] * 3]


class Copied:
    """What process 0 has, for process `rank`."""

    def __init__(self, rank: int, weights: list[Tensor]) -> None:
        self.place, self.weights = Place(rank, 2, rank, 2), weights

    def copy(self, values: Tensor) -> None:
        if self.place.rank:
            values.copy_(self.weights.pop(0))
        else:
            self.weights.append(values.clone())


def test_weights_are_copied_and_masters_stay() -> None:
    first, second, sent = optimizer(), optimizer(), list[Tensor]()
    for parameter in first.parameters.values():
        parameter.data += 0.25
    joints: list[Any] = [Copied(0, sent), Copied(1, sent)]
    before = {key: master.clone() for key, master in second.masters.items()}
    copy_weights(joints[0], first)
    copy_weights(joints[1], second)
    for key, parameter in second.parameters.items():
        assert torch.equal(parameter, first.parameters[key]) and not torch.equal(parameter.float(), before[key])
        assert torch.equal(second.masters[key], before[key])
