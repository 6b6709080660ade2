"""Experts from their files into their slabs, one expert at a time: what is in memory beside the slab is one of them.

transformers stacks all experts of a layer before it quantizes them, which takes a layer's 16-bit weights and more
(huggingface/transformers#47514). A tensor is read from front to back and once, as its hash wants it: a whole expert
where the file has all of them in one tensor, else blocks of its rows. What is published in MXFP4 goes as it is to
where it stays: codes of all experts, then scales, or in the order in which the files have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.model import precision
from qlora.model.expert_pieces import Piece
from qlora.model.experts import Slab, fill
from qlora.model.identity import WeightReader
from qlora.model.mxfp4 import MOST_SCALE, Mxfp4Stack
from qlora.model.weight_receiving import took


def load(model: Any, parameter: str, pieces: Sequence[Piece], reader: WeightReader, device: torch.device) -> None:
    """Give a projection of experts, a stack in 4 bit or a parameter in 16, its weights. Raises ModelError."""
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, leaf)
    if isinstance(held, Mxfp4Stack):
        _take_as_published(held, pieces, reader, device)
    elif isinstance(held, Slab):
        fill(held, partial(_rows_of, reader, pieces, held.shape, module.is_transposed), device)
    else:
        whole = _in_16_bit(held, pieces, reader, device)
        kept = precision.placed(module, leaf, whole, model.config.dtype)
        module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
    took(model, parameter)


def _in_16_bit(held: Tensor, pieces: Sequence[Piece], reader: WeightReader, device: torch.device) -> Tensor:
    """All experts of a projection in bf16, as `held`, which has their shape, has them."""
    whole = torch.empty(held.shape, dtype=torch.bfloat16, device=device)
    for expert in range(held.shape[0]):
        if pieces[0].expert is None:
            whole[expert].copy_(reader.read(pieces[0].tensor, (expert, expert + 1))[0])
        else:
            rows, columns = held.shape[1:]
            whole[expert].copy_(_rows_of(reader, pieces, (held.shape[0], rows, columns), False, expert)(0, rows))
    return whole


def _take_as_published(stack: Mxfp4Stack, pieces: Sequence[Piece], reader: WeightReader, device: torch.device) -> None:
    stack.allocate(device)
    for piece in sorted(
        pieces, key=lambda one: (str(reader.tensors[one.tensor].file), reader.tensors[one.tensor].offset)
    ):
        for expert in range(stack.shape[0]):
            stored = reader.read(piece.tensor, (expert, expert + 1))[0]
            if piece.form == "scales" and int(stored.max()) > MOST_SCALE:
                what = f"{reader.tensors[piece.tensor].file}: {piece.tensor} holds a scale of {int(stored.max())}"
                hint = "download the model again, or ask who published it for a clean copy"
                raise ModelError(f"{what}, with which values are not finite (NaN or infinity)", hint)
            stack.put(expert, piece.form, stored)


def _rows_of(
    reader: WeightReader, pieces: Sequence[Piece], shape: tuple[int, int, int], transposed: bool, expert: int
) -> Any:
    """A function from `start` and `end` to these rows of an expert (out, in) in bf16; blocks are asked for in order."""
    if pieces[0].expert is None:
        whole = reader.read(pieces[0].tensor, (expert, expert + 1))[0]
        matrix = whole.t() if transposed else whole
        return lambda start, end: matrix[start:end].to(torch.bfloat16)
    parts = pieces[0].parts
    own, rows = pieces[expert * parts : (expert + 1) * parts], shape[1] // parts

    def read(start: int, end: int) -> Tensor:
        block = torch.empty(end - start, shape[2], dtype=torch.bfloat16)
        for number, piece in enumerate(own):  # gate's rows, then up's
            first, last = max(start, number * rows), min(end, (number + 1) * rows)
            if first < last:
                taken = reader.read(piece.tensor, (first - number * rows, last - number * rows))
                block[first - start : last - start].copy_(taken)
        return block

    return read
