"""Where each trained tensor lies in the buffers that hold all of them.

Every tensor begins at a multiple of BLOCK values: 8-bit moments share a scale in blocks of that many, so that no block
holds values of two tensors, and the scales are those that each tensor would have by itself. What is left of a tensor's
last block stays zero and moves nothing: no scale is larger for it. Tensors with 8-bit moments come first, the small
ones, whose moments are kept in 32 bit, behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # values that share a scale (bitsandbytes/optim/optimizer.py, init_state: blocksize)
MIN_8BIT_SIZE = 4096  # values; smaller tensors' moments stay in 32 bit (the same file, min_8bit_size)

VECTOR_VALUES = 64  # a multiple of two registers of any CPU: 32 values with AVX-512
SERIAL_VALUES = 32_768  # that torch gives to one thread (at::internal::GRAIN_SIZE, aten/src/ATen/TensorIterator.h)


@dataclass(frozen=True)
class Place:
    """One tensor's values `start` to `end`, and the zeros behind them up to `stop`."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def stop(self) -> int:
        return _padded(self.end)


@dataclass(frozen=True)
class Run:
    """Neighbouring values that are updated alike: `step` is the number of this update of theirs, from 1."""

    start: int
    stop: int
    step: int


class Layout:
    """Places by name; values before `wide_from` have 8-bit moments, those from there to `total` 32-bit ones."""

    def __init__(self, shapes: Mapping[str, torch.Size], eight_bit: bool) -> None:
        large = [key for key, shape in shapes.items() if eight_bit and math.prod(shape) >= MIN_8BIT_SIZE]
        self.places: dict[str, Place] = {}
        self.wide_from = self.total = 0
        for key in (*large, *(key for key in shapes if key not in {*large})):
            self.places[key] = Place(self.total, shapes[key])
            self.total = self.places[key].stop
            if key in large[-1:]:
                self.wide_from = self.total

    def zeros(self, device: torch.device) -> Tensor:
        """One float32 value for each of all tensors' values and their padding."""
        return torch.zeros(self.total, dtype=torch.float32, device=device)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor, in its own shape, as a part of what `zeros` gave."""
        return {key: flat[place.start : place.end].view(place.shape) for key, place in self.places.items()}

    def runs(self, steps: Mapping[str, int], most: int) -> Iterator[Run]:
        """The tensors in `steps` with their padding, in as few runs as their numbers allow; `most` values each, whole
        blocks.
        """
        waiting: Run | None = None
        for run in self._tensors(steps):
            if waiting is not None and self._are_neighbours(waiting, run):
                waiting = Run(waiting.start, _padded(run.stop), run.step)
                continue
            if waiting is not None:
                yield from _cut(waiting, most)
            waiting = Run(run.start, _padded(run.stop), run.step)
        if waiting is not None:
            yield from _cut(waiting, most)

    def runs_on_cpu(self, steps: Mapping[str, int]) -> Iterator[Run]:
        """The same in runs that a CPU updates to the bits of each tensor by itself, with any number of threads.

        torch computes what fills its vector registers with fused multiply-adds and the rest without
        (aten/src/ATen/native/cpu/Loops.h), and hands equal parts of more than SERIAL_VALUES to its threads. So a larger
        tensor is a run of its own, and so is one that ends inside a register; the others join up to that many.
        """
        waiting: Run | None = None
        for run in self._tensors(steps):
            if waiting is not None and self._are_neighbours(waiting, run):
                ends_even = (
                    (waiting.stop - waiting.start) % VECTOR_VALUES == (run.stop - run.start) % VECTOR_VALUES == 0
                )
                if ends_even and run.stop - waiting.start <= SERIAL_VALUES:
                    waiting = Run(waiting.start, run.stop, run.step)
                    continue
            if waiting is not None:
                yield waiting
            waiting = run
        if waiting is not None:
            yield waiting

    def _tensors(self, steps: Mapping[str, int]) -> Iterator[Run]:
        """One run a tensor, without padding, in the buffers' order."""
        for key, place in self.places.items():
            if key in steps and place.start < place.end:
                yield Run(place.start, place.end, steps[key])

    def _are_neighbours(self, one: Run, other: Run) -> bool:
        return _padded(one.stop) == other.start != self.wide_from and one.step == other.step


def _padded(stop: int) -> int:
    return -(-stop // BLOCK) * BLOCK


def _cut(run: Run, most: int) -> Iterator[Run]:
    for start in range(run.start, run.stop, most):
        yield Run(start, min(start + most, run.stop), run.step)
