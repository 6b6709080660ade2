"""Is a run slow because the driver has moved its tensors to RAM? Where it does that, nothing else says so."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from qlora import device as hardware
from qlora.events import Notice, Sink, StepDone

if TYPE_CHECKING:
    import torch

STEPS = 5  # behind a step, whose median is what a step took before: the first one loads kernels
SLOWER = 2.0


class SpillWatch:
    """Looks at each step of a run; says once that it spills."""

    def __init__(self, device: torch.device, sink: Sink) -> None:
        self.device = device
        self.sink = sink
        self._before: deque[float] = deque(maxlen=STEPS)  # seconds a token
        self._is_looking = hardware.is_card(device) and hardware.may_spill()

    def after_step(self, done: StepDone) -> None:
        """A token took twice as long as before, and the card is full: that is not the rows' doing."""
        if not self._is_looking or not done.tokens:
            return
        now = done.seconds / done.tokens
        slow = len(self._before) == STEPS and now > SLOWER * median(self._before)
        if not slow:
            self._before.append(now)
        elif hardware.is_full(self.device):
            self._is_looking = False
            times = now / median(self._before)
            what = f"step {done.step} took {times:.1f} times as long a token as those before, and the GPU is full"
            cure = "close what else uses it, or go on with a lower memory.limit"
            self.sink.emit(Notice("memory", f"{what}: its driver moves tensors to RAM; {cure}", 1))
