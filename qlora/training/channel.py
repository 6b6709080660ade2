"""A process's connections to all others of its run: words and flags by gloo over the host's network, gradients by NCCL.

A process that is killed closes its connections, which the others notice at once; one that hangs, after WAIT_SECONDS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora import device as hardware
from qlora.errors import TrainingStopped
from qlora.foreign_json import checked, parse_object
from qlora.gathering import Gathers, Network, finished
from qlora.processes import Place
from qlora.ranks import Rank
from qlora.training.dividing import Word

JOIN_SECONDS = 600  # for all processes to be there; torchrun starts them within seconds
WAIT_SECONDS = 1800  # for the slowest process's part of a step: its first step may compile kernels
WORD_SECONDS = 86_400  # for process 0's next word: it evaluates, saves and tokenizes alone
LEAVE_SECONDS = 60  # to be told that the run is over
RANK_BYTES = 1024  # of what a process says of its card, as JSON


class Channel:
    """This process's connections to all others. Raises TrainingStopped where one of them is gone."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.place, self.is_open = place, True
        on_card = hardware.is_card(device)
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=JOIN_SECONDS))
            limit = timedelta(seconds=WORD_SECONDS)
            self._words = dist.new_group(backend="gloo", timeout=limit)
            self._gradients = dist.new_group(backend="nccl", timeout=limit) if on_card else self._words
            wires = Network(place, self._gradients if on_card else None, self._lose, limit)
        except (RuntimeError, ValueError) as error:
            raise _gone(place, " ".join(str(error).split())[:200]) from error
        self.gathers = Gathers(wires, lambda: self._tell({"do": "serve"}), WAIT_SECONDS, WORD_SECONDS)
        self.has_begun = False  # process 0's first word was told
        if on_card:  # NCCL takes its buffers now, so that what is free is known when the run is planned
            self.add(torch.zeros(1, device=device))

    def tell(self, word: Word | None, seconds: float = WORD_SECONDS) -> Word:
        """Process 0's word, to all; what it gathered alone until then is over."""
        self.gathers.end(min(seconds, WAIT_SECONDS))
        return self._tell(word, seconds)

    def _tell(self, word: Word | None, seconds: float = WORD_SECONDS) -> Word:
        encoded = json.dumps(word).encode() if word is not None else b""
        size = torch.tensor([len(encoded)])
        self._do(lambda: dist.broadcast(size, 0, group=self._words, async_op=True), seconds)
        content = torch.frombuffer(bytearray(encoded or bytes(int(size))), dtype=torch.uint8)
        self._do(lambda: dist.broadcast(content, 0, group=self._words, async_op=True), seconds)
        return dict(json.loads(content.numpy().tobytes()))

    def largest(self, values: Tensor) -> None:
        """Each value on the host becomes the largest of all processes'."""
        work = lambda: dist.all_reduce(values, dist.ReduceOp.MAX, group=self._words, async_op=True)  # noqa: E731
        self._do(work, WAIT_SECONDS)

    def tell_ranks(self, own: Rank) -> tuple[Rank, ...]:
        """What each process computes with, by their numbers."""
        content = torch.zeros(self.place.size, RANK_BYTES, dtype=torch.uint8)
        encoded = own.model_dump_json().encode()[:RANK_BYTES]
        content[self.place.rank, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        self.largest(content)
        words = [bytes(row).rstrip(b"\0") for row in content.numpy()]
        return tuple(checked(Rank, parse_object(word, f"process {n}"), f"process {n}") for n, word in enumerate(words))

    def add(self, values: Tensor) -> None:
        """Each value on the device becomes the sum of all processes'."""
        work = lambda: dist.all_reduce(values, group=self._gradients, async_op=True)  # noqa: E731
        self._do(work, WAIT_SECONDS)

    def collect(self, values: Tensor) -> None:
        """Each integer on the host becomes the sum of all processes'."""
        self._do(lambda: dist.all_reduce(values, group=self._words, async_op=True), WAIT_SECONDS)

    def copy(self, values: Tensor) -> None:
        """Values on the host become those of process 0."""
        self._do(lambda: dist.broadcast(values, 0, group=self._words, async_op=True), WAIT_SECONDS)

    def close(self) -> None:
        self.gathers.close()
        if self.is_open:
            self.is_open = False
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _do(self, begin: Callable[[], Any], seconds: float) -> None:
        try:
            if not self.is_open:
                raise RuntimeError("as was seen before")
            finished(begin, seconds)
        except RuntimeError as error:
            raise self._lose(error) from error

    def _lose(self, error: RuntimeError) -> TrainingStopped:
        self.is_open = False  # what is under way cannot be ended in order
        return _gone(self.place, " ".join(str(error).split())[-200:])


def _gone(place: Place, why: str) -> TrainingStopped:
    what = f"{place}: another process of the run is gone or does not answer ({why})"
    return TrainingStopped(what, "look for its own error above, then go on with mode='resume'")
