"""How packs are laid out in rows of tensors: on a CPU as its numbers have always been, on a GPU as it computes fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from qlora import numerics
from qlora.device import is_card

PAD_TO_MULTIPLE = 8  # a row of tokens is padded to a multiple of it, which keeps tensor cores busy
# On a GPU: SDPA copies a mask whose rows are no multiple of 16 (aten, transformers/attention.cpp, pad_bias).
GPU_MULTIPLE = 16
MOST_ADDED = 1 / 8


@dataclass(frozen=True)
class Layout:
    """How packs are laid out in rows. The default is the CPU's, whose numbers depend on it to the last bit.

    multiple   rows are padded to a multiple of it
    continues  padding goes on with the positions of the document before it. That document's tokens, which look back
               only, don't see it, and a row of one document needs no mask: only so do kernels without one take it.
               It ends at the longest document's last position: some models choose their rotary frequencies by the
               highest position of a micro-batch (transformers, modeling_rope_utils: longrope, dynamic)
    width      rows are at least so long, and
    rows       a micro-batch has so many, the last of them padding alone: one shape for every step
    fixed      one width, whatever it adds
    """

    multiple: int = PAD_TO_MULTIPLE
    continues: bool = False
    width: int = 0
    rows: int = 0
    fixed: bool = False

    def steady(self, lengths: Sequence[int]) -> Layout:
        """With one width for packs of `lengths` tokens, where that adds at most MOST_ADDED of what they have.

        A CPU gains nothing by it. What comes in one shape leaves the allocator no holes, and is compiled once.
        """
        padded = [-(-length // self.multiple) * self.multiple for length in lengths]
        widest = max(padded, default=0)
        few = self.fixed or (self.continues and widest * len(padded) <= (1 + MOST_ADDED) * sum(padded))
        return replace(self, width=widest) if few else self

    def of_rows(self, rows: int, of_step: int) -> Layout:
        """For micro-batches of `rows` of a step of `of_step` packs: full ones all, where only an epoch's end has less.

        Elsewhere every step would compute rows of nothing.
        """
        return replace(self, rows=rows) if self.width and of_step % rows == 0 else self

    @classmethod
    def of_run(cls, device: torch.device) -> Layout:
        """Of the steps of the run under way: in one width whatever that adds, where layers must be compiled."""
        run = numerics.of_run()
        if run is None or not run.compiled:
            return cls.on(device)
        return cls(GPU_MULTIPLE, continues=True, fixed=True)

    @classmethod
    def on(cls, device: torch.device) -> Layout:
        return cls(GPU_MULTIPLE, continues=True) if is_card(device) else ON_CPU


ON_CPU = Layout()


def documents_of(
    packs: Sequence[Sequence[int]], width: int, layout: Layout
) -> tuple[torch.Tensor, tuple[int, ...], bool]:
    """`cu_seqlens`, `document_lengths` and `single` of a micro-batch (see Batch), from the lengths in each pack.

    What is left of a row of `width` tokens is of its last document; a row of nothing is one document.
    """
    lengths: list[int] = []
    for pack in packs:
        lengths += [*pack[:-1], width - sum(pack[:-1])]
    single = all(len(pack) < 2 and (layout.continues or sum(pack) in (0, width)) for pack in packs)
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), tuple(lengths), single
