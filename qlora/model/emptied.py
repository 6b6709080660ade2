"""A model at the end of its run: its tensors are given back, whoever still holds the model.

An error that somebody keeps (a notebook keeps the last one) holds the calls that it came through, and a 4-bit weight
and its layer hold each other: the next model would be loaded beside all of this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qlora.model import weight_streaming


def empty(model: Any) -> None:
    """Take the values of each parameter, buffer and block constant; the model can compute nothing any more."""
    if (streamed := weight_streaming.inside(model)) is not None:
        streamed.close()
    for module in model.modules():  # what runs its layers holds blocks of the host's memory for their inputs
        vars(module).pop("_gradient_checkpointing_func", None)
    for tensor in [*model.parameters(), *model.buffers(), *_block_constants(model)]:
        tensor.data = tensor.data.new_empty(0)


def _block_constants(model: Any) -> Iterator[Tensor]:
    """Of 4-bit weights; not their code tables, which bitsandbytes shares among all models of a process."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            found = (getattr(one, name, None) for name in ("absmax", "offset"))
            yield from (value for value in found if isinstance(value, Tensor))
