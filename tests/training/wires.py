"""Channels to another process of a run, which are made here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora.gathering import Gathers
from qlora.processes import Place
from qlora.training.dividing import FINE, NO_MEMORY, STOP


class Wire:
    """A channel to one other process, which shows `code` and a gradient of ones for `its` parameters."""

    def __init__(self, code: int = FINE, its: int = 4, digest: int | None = None) -> None:
        self.place, self.is_open, self.has_begun = Place(0, 2, 0, 2), True, False
        self.gathers = Gathers(self, lambda: None, 1.0, 1.0)  # type: ignore[arg-type]
        self.code, self.its, self.digest, self.words, self.added = code, its, digest, [], []
        self.asked = 0

    def tell(self, word: dict[str, Any] | None, _seconds: float = 0) -> dict[str, Any]:
        assert word is not None
        self.words.append(word["do"])
        return word

    def largest(self, values: Tensor) -> None:
        self.asked += 1
        values[3] = values[2] if self.digest is None else self.digest
        if self.asked > 1 or self.code not in (NO_MEMORY, STOP):  # it has loaded before it runs out of memory
            values[1] = self.code
            values[4 : 4 + self.its] = torch.maximum(values[4 : 4 + self.its], torch.tensor(1))

    def add(self, values: Tensor) -> None:
        self.added.append(values.clone())
        values += 1

    def collect(self, values: Tensor) -> None:
        pass

    def copy(self, values: Tensor) -> None:
        pass

    def close(self) -> None:
        self.is_open = False


class Held:
    """A channel that keeps what is copied, and gives it again."""

    def __init__(self) -> None:
        self.place, self.held = Place(0, 2, 0, 2), list[Tensor]()

    def copy(self, values: Tensor) -> None:
        if self.place.rank:
            values.copy_(self.held.pop(0))
        else:
            self.held.append(values.clone())
