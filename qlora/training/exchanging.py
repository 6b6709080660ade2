"""What the processes of a run exchange beside words: how each one's part of a step went, gradients, and the state.

Gradients are one `all_reduce` of the flat fp32 buffer; a state is copied once, when a run begins or goes on. Every
SAME_EVERY steps the processes show a hash of their weights with their codes, so that none trains on beside the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlora import device as hardware
from qlora.errors import TrainingStopped
from qlora.step.group_relative import GroupObjective, Seen
from qlora.step.loss import Objective
from qlora.step.objectives import Figures, PreferenceObjective
from qlora.step.optimizer import AdapterOptimizer
from qlora.training.dividing import Joint, worst

SAME_EVERY = 100  # steps between comparisons of the processes' weights


@dataclass
class Shown:
    """What each process shows before gradients are summed."""

    codes: list[int]
    complete: Tensor  # which parameters have a gradient somewhere
    took: tuple[int, ...] = ()  # microseconds of each, where they were measured

    @property
    def worst(self) -> tuple[int, int]:
        return worst(self.codes)


class Sums(NamedTuple):
    """What an objective has `seen` of each micro-batch of a step: `width` figures each, in fp64."""

    seen: list[Tensor]
    width: int

    @classmethod
    def of(cls, objective: Objective) -> Sums | None:
        """None of supervised rows, of which nothing is seen beside the loss."""
        if isinstance(objective, GroupObjective):
            return cls(objective.seen, len(Seen._fields))
        return cls(objective.seen, len(Figures._fields)) if isinstance(objective, PreferenceObjective) else None


def shown(joint: Joint, optimizer: AdapterOptimizer, code: int, step: int, took: int = 0) -> Shown:
    """Show how this process's part of a step went, and in how many microseconds, and see the others'."""
    gradients = optimizer.gradients
    complete = [int(key in gradients) for key in optimizer.masters]
    return _shown(joint, (code, took), _digest(optimizer) if step % SAME_EVERY == 0 else 0, complete, step)


def show_failure(joint: Joint, code: int, parameters: int) -> None:
    """The same of a process that has not come so far as to have an optimizer."""
    _shown(joint, (code, 0), 0, [0] * parameters, 1)


def _shown(joint: Joint, part: tuple[int, int], digest: int, complete: list[int], step: int) -> Shown:
    size, rank, known = joint.place.size, joint.place.rank, 2 * joint.place.size + len(complete)
    values = torch.zeros(known + size, dtype=torch.int64)
    values[rank], values[size + rank], values[2 * size : known] = part[0], digest, torch.tensor(complete)
    values[known + rank] = part[1]
    joint.largest(values)
    digests = values[size : 2 * size].tolist()
    if len(set(digests)) > 1:
        other = next(number for number, digest in enumerate(digests) if digest != digests[0])
        what = f"step {step}: the weights of process {other} are not those of process 0"
        raise TrainingStopped(what, "the newest checkpoint is whole: go on with mode='resume'; please report this")
    return Shown(values[:size].tolist(), values[2 * size : known], tuple(values[known:].tolist()))


def _digest(optimizer: AdapterOptimizer) -> int:
    sha = hashlib.sha256()
    for master in optimizer.masters.values():
        sha.update(hardware.to_host(master).contiguous().numpy().data)
    return int.from_bytes(sha.digest()[:7], "little") + 1


def add_up(joint: Joint, optimizer: AdapterOptimizer, losses: Tensor, complete: Tensor, sums: Sums | None) -> None:
    """The step's gradient, its micro-batches' losses, and what its objective has seen, of all processes."""
    keys = [key for key, there in zip(optimizer.masters, complete.tolist(), strict=True) if there]
    joint.add(optimizer.flat_gradient(keys))
    joint.add(losses)
    if sums is not None:
        none = torch.zeros(sums.width, dtype=torch.float64, device=losses.device)
        sums.seen[:] = [torch.stack([none, *sums.seen]).sum(0)]
        joint.add(sums.seen[0])


def bytes_of_step(optimizer: AdapterOptimizer, micro_batches: int, sums: Sums | None) -> int:
    """What `add_up` adds up in each step: a gradient as long as the masters, losses in fp32, figures in fp64."""
    return optimizer.buffer_sizes[0] + 4 * micro_batches + (0 if sums is None else 8 * sums.width)


def trained(optimizer: AdapterOptimizer) -> str:
    """sha256 of names and shapes of what is trained: processes exchange it in one order, without names."""
    shapes = [(key, list(master.shape)) for key, master in optimizer.masters.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def copy_state(joint: Joint, optimizer: AdapterOptimizer, counters: Mapping[str, int]) -> None:
    """Process 0's masters and moments, in every process; `counters` are its numbers of updates."""
    if joint.place.rank:
        optimizer.updates = dict(counters)  # they decide which moments there are
    tensors, _ = optimizer.state()
    for name in sorted(tensors):
        joint.copy(tensors[name].view(torch.uint8))
    if joint.place.rank:
        optimizer.load_state(tensors, counters)


@torch.no_grad()
def copy_weights(joint: Joint, optimizer: AdapterOptimizer) -> None:
    """Process 0's trained weights, in every model; masters and moments stay."""
    for parameter in optimizer.parameters.values():
        held = hardware.to_host(parameter.detach()).contiguous()
        joint.copy(held.reshape(-1).view(torch.uint8))
        if joint.place.rank:
            parameter.copy_(held)
