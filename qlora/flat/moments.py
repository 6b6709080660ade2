"""An optimizer's moments of all tensors in one buffer of bytes, which may be paged: one move brings all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.device import is_card, on_default_stream, synchronize, to_host
from qlora.flat.layout import BLOCK, Layout, Run
from qlora.flat.managed import ManagedMemory, why_not
from qlora.flat.methods import Method, Values, codes, update


@dataclass(frozen=True)
class MomentViews:
    """Parts of one buffer, by slot: 8-bit moments with their scales, and 32-bit ones of small tensors (or of all)."""

    layout: Layout
    narrow: Mapping[str, Tensor]
    wide: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    @classmethod
    def of(cls, layout: Layout, method: Method, buffer: Tensor) -> MomentViews:
        """The parts of `buffer`, whose bytes are all taken."""
        narrow, wide = layout.wide_from, 4 * (layout.total - layout.wide_from)
        sizes = [narrow, wide, narrow // BLOCK * 4]
        parts = iter(torch.split(buffer, [size for size in sizes for _ in method.slots]))
        found = [{slot: next(parts) for slot in method.slots} for _ in sizes]
        in_fp32 = [{slot: part.view(torch.float32) for slot, part in parts.items()} for parts in found[1:]]
        return cls(layout, found[0], *in_fp32)

    def of_tensor(self, key: str) -> dict[str, Tensor]:
        """One tensor's moments in its own shape, and the scales of its blocks, under their names in a checkpoint."""
        place = self.layout.places[key]
        if (start := place.start - self.layout.wide_from) >= 0:
            end = place.end - self.layout.wide_from
            return {slot: flat[start:end].view(place.shape) for slot, flat in self.wide.items()}
        found = {slot: flat[place.start : place.end].view(place.shape) for slot, flat in self.narrow.items()}
        blocks = slice(place.start // BLOCK, place.stop // BLOCK)
        return found | {slot.replace("state", "absmax"): flat[blocks] for slot, flat in self.scales.items()}


class Moments:
    """The moments of a `layout`, made once: what is put back goes into the same memory."""

    def __init__(self, layout: Layout, method: Method, device: torch.device, paged: bool) -> None:
        """`paged` where the driver can; else `not_paged` says why they are resident."""
        self.layout, self.method, self.device = layout, method, device
        count = len(method.slots) * (layout.wide_from * (BLOCK + 4) // BLOCK + 4 * (layout.total - layout.wide_from))
        self.not_paged = why_not(device, count) if paged else ""
        self.memory = ManagedMemory(count, device) if paged and not self.not_paged else None
        self.buffer = self.memory.tensor if self.memory else torch.zeros(count, dtype=torch.uint8, device=device)
        self.views = MomentViews.of(layout, method, self.buffer)
        self.codes = codes(device) if layout.wide_from else None

    def update(
        self, weights: Tensor, gradients: Tensor, steps: Mapping[str, int], learning_rate: float, weight_decay: float
    ) -> None:
        """Update the tensors in `steps`, each for the time that stands there. Asks the device nothing.

        bitsandbytes' kernels and moves run on the default stream, whatever torch's current one is.
        """
        with on_default_stream(self.device):
            if self.memory is not None:
                self.memory.prefetch()
            for run in self._runs(steps):
                values = self._values(weights, gradients, run.start, run.stop)
                update(self.method, values, run.step, learning_rate, weight_decay)

    def _runs(self, steps: Mapping[str, int]) -> Iterator[Run]:
        if self.device.type == "cpu" and not is_card(self.device):
            return self.layout.runs_on_cpu(steps)
        return self.layout.runs(steps, self.method.most_values)

    def _values(self, weights: Tensor, gradients: Tensor, start: int, stop: int) -> Values:
        views, here = self.views, slice(start, stop)
        if start >= (skipped := self.layout.wide_from):
            wide = {slot: flat[start - skipped : stop - skipped] for slot, flat in views.wide.items()}
            return Values(weights[here], gradients[here], wide, {}, None)
        narrow = {slot: flat[here] for slot, flat in views.narrow.items()}
        scales = {slot: flat[start // BLOCK : -(-stop // BLOCK)] for slot, flat in views.scales.items()}
        return Values(weights[here], gradients[here], narrow, scales, self.codes)

    def on_host(self) -> MomentViews:
        """A copy in host memory that no update changes."""
        synchronize(self.device)  # a paged buffer looks like host memory, and is read without waiting
        return MomentViews.of(self.layout, self.method, to_host(self.buffer))

    def empty_on_host(self) -> tuple[Tensor, MomentViews]:
        """Moments of no update yet, in host memory, and the buffer that `put_back` takes."""
        buffer = torch.zeros(self.buffer.shape, dtype=torch.uint8)
        return buffer, MomentViews.of(self.layout, self.method, buffer)

    def put_back(self, buffer: Tensor) -> None:
        synchronize(self.device)
        self.buffer.copy_(buffer)

    def free(self) -> None:
        """Give the memory back, at the end of a run; there are no moments afterwards."""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.views = MomentViews(self.layout, {}, {}, {})
        if self.memory is not None:
            self.memory.free()
