"""Where the experts of a mixture stand in a GGUF file, from whichever form they have in the checkpoint.

llama.cpp wants them one after another: `ffn_gate_exps`, `ffn_up_exps` (E, I, H) and `ffn_down_exps` (E, H, I), of
Gemma 4 gate and up above each other in `ffn_gate_up_exps` (E, 2I, H). A checkpoint has a tensor an expert and matrix,
or one of all experts: gate and up above each other, or row by row in turns (gpt-oss, which stores them transposed too).
How it is comes from the module's own attributes: shapes do not tell, since experts may be narrower or wider than the
model. An expert is a range of rows of the file's tensor, so that each is read, changed, encoded, appended by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.export.gguf.family import NOTHING, Change, ExpertTensor, Facts, Place, Shape
from qlora.export.gguf.rope import Key
from qlora.model.expert_pieces import Piece

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def expert_tensors(model: Any, pieces: Mapping[str, tuple[str, Piece]]) -> dict[str, ExpertTensor]:
    """The stored tensors of a causal model that hold experts, by name; `pieces`: the projection and piece of each."""
    found = {}
    for name, (projection, piece) in pieces.items():
        owner, _, leaf = projection.rpartition(".")
        module = model.get_submodule(owner)
        count = getattr(module, leaf).shape[0]
        found[name] = ExpertTensor(projection, piece, count, bool(module.is_transposed), bool(module.is_concatenated))
    return found


def expert_keys(facts: Facts) -> list[Key]:
    """How many experts a layer has, how many a token goes to, and how wide they are."""
    config = facts.config
    widths = ("moe_intermediate_size", "intermediate_size")
    return [
        ("expert_count", next(one.count for one in facts.experts.values())),
        ("expert_used_count", int(facts.value("num_experts_per_tok") or facts.value("top_k_experts"))),
        ("expert_feed_forward_length", next(int(value) for key in widths if (value := getattr(config, key, None)))),
    ]


def block_of(parameter: str) -> str:
    """What llama.cpp calls the layer of a parameter: blk.N."""
    layer = _LAYER.search(parameter)
    assert layer is not None, f"{parameter} is in no layer"
    return f"blk.{layer[1]}"


def places(tensor: ExpertTensor, shape: Shape, fused: bool) -> Sequence[Place]:
    """Where a tensor of experts of `shape` stands; `fused`: its architecture has gate and up in one."""
    block, piece = block_of(tensor.projection), tensor.piece
    gated = tensor.projection.endswith("gate_up_proj")
    names = ["gate_up"] if fused else ["gate", "up"]
    named = [f"{block}.ffn_{name}_exps.weight" for name in (names if gated else ["down"])]
    if piece.expert is None:
        return _of_all(tensor, shape, named)
    rows, columns = shape
    each = rows * piece.parts // len(named)  # rows that an expert has in a tensor of the file
    stored = (tensor.count, each, columns)
    if piece.parts == len(named) or fused:
        at = piece.expert * each + (piece.part * rows if piece.parts > len(named) else 0)
        return (Place(named[piece.part if piece.parts == len(named) else 0], at=at, stored=stored, change=NOTHING),)
    return tuple(
        Place(name, number * each, (number + 1) * each, piece.expert * each, stored, NOTHING)
        for number, name in enumerate(named)
    )


def _of_all(tensor: ExpertTensor, shape: Shape, named: Sequence[str]) -> Sequence[Place]:
    """Of a tensor of all experts, rows of which are experts."""
    if tensor.piece.form:
        return _in_mxfp4(tensor, shape, named)
    out = shape[2] if tensor.transposed else shape[1]
    if len(named) == 1:
        return (Place(named[0], change=turned(tensor.transposed, slice(None), out)),)
    shares = (slice(0, out // 2), slice(out // 2, out)) if tensor.concatenated else (slice(0, out, 2), slice(1, out, 2))
    return tuple(
        Place(name, change=turned(tensor.transposed, share, out)) for name, share in zip(named, shares, strict=True)
    )


def _in_mxfp4(tensor: ExpertTensor, shape: Shape, named: Sequence[str]) -> Sequence[Place]:
    """Of codes (E, out, in / 32, 16) or scales (E, out, in / 32), which are never stored transposed."""
    count, out, width = shape[0], shape[1], shape[2] * 32
    shares = [slice(None)]
    if len(named) > 1:
        shares = [slice(0, out, 2), slice(1, out, 2)]
        if tensor.concatenated:
            shares = [slice(0, out // 2), slice(out // 2, out)]
    found = []
    for name, share in zip(named, shares, strict=True):
        stored = (count, len(range(*share.indices(out))), width)
        change = replace(turned(False, share, out), shape=partial(_always, stored))
        found.append(Place(name, stored=stored, change=change))
    return found


def _always(shape: Shape, _: Shape) -> Shape:
    return shape


def turned(transposed: bool, share: slice, out: int) -> Change:
    """A `share` of the `out` output rows of each expert (of a bias: of its values), stored (E, in, out) or not."""
    count = len(range(*share.indices(out)))

    def to_gguf(rows: Tensor, unit: int) -> Tensor:
        return (rows.transpose(1, 2) if transposed else rows)[:, share].contiguous()

    def inverse(rows: Tensor, unit: int) -> Tensor:
        whole = torch.zeros(rows.shape[0], out, *rows.shape[2:], dtype=rows.dtype)
        whole[:, share] = rows
        return whole.transpose(1, 2).contiguous() if transposed else whole

    def shape(own: Shape) -> Shape:
        return (own[0], count, *(own[1:2] if transposed else own[2:]))

    return Change(f"experts {share.start}::{share.step}", to_gguf, inverse, shape=shape)
