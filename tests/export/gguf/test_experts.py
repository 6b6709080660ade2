"""Where experts stand in a file, from each form that they are stored in: the rows of a tensor, and their values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlora.export.gguf.experts import block_of, expert_keys, expert_tensors, places, turned
from qlora.export.gguf.family import ExpertTensor, Facts
from qlora.model.expert_pieces import Piece

GATE_UP, DOWN = "model.layers.7.mlp.experts.gate_up_proj", "model.layers.7.mlp.experts.down_proj"


def expert(projection: str, piece: Piece, **how: bool) -> ExpertTensor:
    return ExpertTensor(projection, piece, 4, **how)


def test_a_layer_is_numbered_as_transformers_numbers_it() -> None:
    assert block_of(GATE_UP) == block_of("model.layers.7") == "blk.7"
    assert block_of("model.language_model.layers.12.mlp.gate.weight") == "blk.12"


@pytest.mark.parametrize(
    ("piece", "name", "at"),
    [
        (Piece("x", 2, 0, 2), "blk.7.ffn_gate_exps.weight", 2 * 3),
        (Piece("x", 2, 1, 2), "blk.7.ffn_up_exps.weight", 2 * 3),
        (Piece("x", 0, 1, 2), "blk.7.ffn_up_exps.weight", 0),
    ],
)
def test_gate_and_up_of_an_expert_are_rows_of_two_tensors(piece: Piece, name: str, at: int) -> None:
    (place,) = places(expert(GATE_UP, piece), (3, 5), fused=False)
    assert (place.name, place.at, place.stored, place.last) == (name, at, (4, 3, 5), None)


def test_what_an_expert_ends_with_is_its_rows() -> None:
    (place,) = places(expert(DOWN, Piece("x", 3)), (5, 3), fused=False)
    assert (place.name, place.at, place.stored) == ("blk.7.ffn_down_exps.weight", 3 * 5, (4, 5, 3))


def test_fused_gate_stands_above_up_in_each_expert() -> None:
    (gate,), (up,) = (places(expert(GATE_UP, Piece("x", 2, part, 2)), (3, 5), fused=True) for part in (0, 1))
    assert gate.name == up.name == "blk.7.ffn_gate_up_exps.weight"
    assert (gate.at, up.at) == (2 * 6, 2 * 6 + 3) and gate.stored == up.stored == (4, 6, 5)


def test_an_expert_with_both_in_one_is_cut() -> None:
    gate, up = places(expert(GATE_UP, Piece("x", 1)), (6, 5), fused=False)
    assert (gate.first, gate.last, gate.at, gate.stored) == (0, 3, 3, (4, 3, 5))
    assert (up.name, up.first, up.last, up.at) == ("blk.7.ffn_up_exps.weight", 3, 6, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_all_experts_in_one_tensor(transposed: bool, concatenated: bool) -> None:
    """Values tell expert, row and column; gate and up stand above each other or in turns."""
    stack = 100 * torch.arange(4.0)[:, None, None] + 10 * torch.arange(6.0)[:, None] + torch.arange(2.0)
    stored = stack.transpose(1, 2).contiguous() if transposed else stack
    how = {"transposed": transposed, "concatenated": concatenated}
    gate, up = places(expert(GATE_UP, Piece("x", None), **how), tuple(stored.shape), fused=False)
    wanted = (stack[:, :3], stack[:, 3:]) if concatenated else (stack[:, ::2], stack[:, 1::2])
    whole = torch.zeros_like(stored)
    for place, own in zip((gate, up), wanted, strict=True):
        assert place.change is not None
        found = place.change.to_gguf(stored, 1)
        assert torch.equal(found, own) and found.shape == place.change.shape(tuple(stored.shape))
        whole += place.change.inverse(found, 1)
    assert torch.equal(whole, stored)


def test_biases_in_turns_are_parted_as_rows_are() -> None:
    change = turned(False, slice(1, 6, 2), 6)
    rows = torch.arange(12.0).view(2, 6)
    assert change.to_gguf(rows, 1).tolist() == [[1, 3, 5], [7, 9, 11]] and change.shape((2, 6)) == (2, 3)
    assert change.inverse(change.to_gguf(rows, 1), 1).tolist() == [[0, 1, 0, 3, 0, 5], [0, 7, 0, 9, 0, 11]]


class _Experts(nn.Module):
    is_transposed, is_concatenated = True, False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 6))


def test_how_it_is_stored_comes_from_the_modules_attributes() -> None:
    model = nn.Module()
    model.experts = _Experts()
    found = expert_tensors(model, {"name": ("experts.gate_up_proj", Piece("name", None))})
    assert found == {"name": ExpertTensor("experts.gate_up_proj", Piece("name", None), 4, True, False)}


def test_keys_of_experts_are_counted_in_the_model() -> None:
    config: Any = SimpleNamespace(top_k_experts=2, moe_intermediate_size=5)
    facts = Facts(config, {}, 8, 8, False, {"x": expert(DOWN, Piece("x", 0))})
    assert dict(expert_keys(facts)) == {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 5,
    }
