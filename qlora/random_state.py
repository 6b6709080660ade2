"""The state that random numbers are drawn from, kept and put back: what is computed a second time draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora import device as hardware


@dataclass(frozen=True)
class RandomState:
    """Of the host's generator, and of the GPU's where `device` is one; tensors of a few KB on the host."""

    device: Any
    of_host: Any
    of_card: Any

    @classmethod
    def of(cls, device: Any) -> RandomState:
        """As it is now."""
        import torch

        on_card = hardware.accelerator.get_rng_state(device) if hardware.is_card(device) else None
        return cls(device, torch.get_rng_state(), on_card)

    def put(self) -> None:
        """From now on the same numbers are drawn as after it was taken."""
        import torch

        torch.set_rng_state(self.of_host)
        if self.of_card is not None:
            hardware.accelerator.set_rng_state(self.of_card, self.device)

    @contextmanager
    def drawing_again(self) -> Iterator[None]:
        """Inside, the same numbers are drawn as after it was taken; behind it, as if none had been."""
        now = RandomState.of(self.device)
        self.put()
        try:
            yield
        finally:
            now.put()
