"""The table of a model's head on the host, of which the device holds two blocks of rows while it is asked.

As layers do (`weight_streaming.py`), blocks take two places in turn: while logits of one are computed, the next one is
copied beside that. Training and evaluation ask for each block once for all tokens (`step/head_blocks.py`); whoever
calls the head itself, as an answer's tokens and the self-check do, gets its logits from the same blocks. The places are
given back after each pass: the layers' backward pass has their memory.

On the host the table is pinned block by block: torch pins memory in powers of two, which a block nearly is and a table
is not (1.16 GiB of 152,064 x 4,096 would take 2). The parameter has no values then. Where embeddings are tied to the
head they are looked up in the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora import device as hardware
from qlora import numerics
from qlora.copy_stream import CopyStream
from qlora.events import Notice, Sink
from qlora.model.reclassed import called_as
from qlora.model.weight_stores import Arriving, copied
from qlora.model.weight_streaming import SLOTS, Ring
from qlora.step import head_blocks
from qlora.step.head_blocks import Block
from qlora.units import gib


class StreamedHead:
    """Sends a head's rows (`head_blocks.Sender`), and is the store of its blocks (`weight_stores.Store`)."""

    def __init__(self, head: Any, tied: nn.Module | None, rows: int, device: torch.device) -> None:
        self.head, self.tied, self.rows, self.device = head, tied, rows, device
        self.kind = type(head)
        self.ring = Ring(self, rows * head.weight.shape[1] * head.weight.itemsize, device)
        self._pinned: list[Tensor] = []  # the blocks, once the table is cut into them

    @property
    def host_bytes(self) -> int:
        return int(self.head.weight.nbytes)

    @property
    def starts(self) -> range:
        return range(0, self.head.weight.shape[0], self.rows)

    def blocks(self, back: bool = False, again: bool = False) -> Iterator[Block]:
        weight, bias, starts = self.head.weight, self.head.bias, self.starts
        order = [*reversed(range(len(starts)))] if back else [*range(len(starts))]
        for number, following in zip(order, [*order[1:], None], strict=True):
            try:
                blob = self.ring.hold(number)
                if following is not None:
                    self.ring.ask_for(following)
                part = slice(starts[number], min(starts[number] + self.rows, weight.shape[0]))
                count = part.stop - part.start
                rows = blob.view(weight.dtype).view(-1, weight.shape[1])[:count]
                yield part.start, rows, None if bias is None else bias[part]
            finally:
                self.ring.let_go(number)
        if not again:
            self.ring.slots = []  # nothing is on its way to them; whoever has their memory next computes behind them

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        place = self._place(layer).view(-1).view(torch.uint8)
        return copied([(slot[: len(place)], place)], copies, after)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the table (..., D) for ids on the host."""
        flat, width = ids.flatten(), self.head.weight.shape[1]
        found = torch.empty(len(flat), width, dtype=self.head.weight.dtype)
        for number, start in enumerate(self.starts):
            here = ((flat >= start) & (flat < start + self.rows)).nonzero().squeeze(1)
            found[here] = self._place(number)[flat[here] - start]
        return found.view(*ids.shape, width)

    def pin(self, sink: Sink) -> None:
        """Cut the table into pinned blocks, from which a GPU copies beside computing; where the system refuses, the
        rest is pageable, and a notice says how much that is. Elsewhere than beside a GPU it stays as it is."""
        weight, pins, pageable = self.head.weight, hardware.is_card(self.device), 0
        if not pins or weight.is_meta:
            return
        for number in range(len(self.starts)):
            block = self._table(number)
            taken = hardware.pinned(block, self.device) if pins else block
            pins = taken is not block  # refused once, refused again
            if not pins and not self._pinned:
                break
            pageable += 0 if pins else block.nbytes
            self._pinned.append(taken if pins else block.clone())
        if self._pinned:
            self._share(nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))
        if pageable or not self._pinned:
            share = (pageable or weight.nbytes) / weight.nbytes
            message = f"the system pins no more memory: {share:.0%} of the head are copied more slowly"
            sink.emit(Notice("memory", f"{message}, and the host waits for them"))

    def give_back(self) -> None:
        """The head on the device from now on, as it is in other models: it is to be trained, or replaced."""
        weight = torch.empty(self.head.weight.shape, dtype=self.head.weight.dtype, device=self.device)
        for number, start in enumerate(self.starts):
            weight[start : start + self.rows] = self._place(number)
        head_blocks.send_by(self.head, None)
        self.head.__class__ = self.kind
        self._share(nn.Parameter(weight, requires_grad=False))
        self.close()

    def reset(self) -> None:
        """The places are given back, whatever went wrong."""
        self.ring.empty()

    def close(self) -> None:
        self.reset()
        self._pinned = []

    def _place(self, number: int) -> Tensor:
        return self._pinned[number] if self._pinned else self._table(number)

    def _table(self, number: int) -> Tensor:
        start = self.starts[number]
        return self.head.weight.detach()[start : start + self.rows]  # type: ignore[no-any-return]

    def _share(self, weight: nn.Parameter) -> None:
        for module in (self.head, self.tied):
            if module is not None:
                module.weight = weight


def put_in(head: Any, tied: nn.Module | None, device: torch.device, sink: Sink) -> StreamedHead:
    """From now on a head comes in blocks: as many rows as the run under way began with. `tied`: embeddings that have
    the same table."""
    run = numerics.of_run()
    rows = (run and run.head_block) or head_blocks.rows_of(*head.weight.shape)
    sender = StreamedHead(head, tied, rows, device)
    head.__class__ = _sent(type(head))
    head_blocks.send_by(head, sender)
    if head.weight.is_meta:
        return sender
    if run is not None and run.head_block != rows:
        if run.head_block == 0:  # recorded: the run had its head as a whole
            what = f"rows a block of the head 0 (now {rows})"
            sink.emit(Notice("resume", f"the rest of the run is not bit for bit what it would have been: {what}", 1))
        numerics.correct(run.model_copy(update={"head_block": rows}))
    held, places = gib(sender.host_bytes), gib(SLOTS * sender.ring.nbytes)
    message = f"the head is streamed: {len(sender.starts)} blocks of {rows:,} rows ({held}) through {places}"
    sink.emit(Notice("memory", f"{message}, while a loss or logits are computed", len(sender.starts)))
    return sender


def saves(head: Any) -> bool:
    """Whether a head is one product, and larger than the two places of its blocks together."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    return head.weight.shape[0] > SLOTS * head_blocks.rows_of(*head.weight.shape)


def inside(model: Any) -> StreamedHead | None:
    """Who sends the head of a causal model; None: it is on the device."""
    head = model.get_output_embeddings()
    found = None if head is None else head_blocks.sender_of(head)
    return found if isinstance(found, StreamedHead) else None


def _sent(kind: Any) -> Any:
    """A head whose logits come from blocks of its rows."""

    class Sent(kind):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            sender = head_blocks.sender_of(self)
            assert sender is not None and not (torch.is_grad_enabled() and hidden.requires_grad), (
                "no gradient goes here"
            )
            logits = hidden.new_empty((*hidden.shape[:-1], self.weight.shape[0]))
            for start, weight, bias in sender.blocks():
                logits[..., start : start + len(weight)] = linear(hidden, weight, bias)
            return logits

    return called_as(kind, Sent)
