"""Where peft's files have the matrices of experts: names, strides, and what tells an exchanged layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.model.expert_layout import PROJECTIONS, ExpertAdapter, in_file, names_in_file, of_file, targets_of
from qlora.model.experts import projections
from qlora.model.tensors import TensorEntry
from tests.families import make_model
from tests.mixtures import MIXTURES, make_config


def adapter(rows: int, width: int, out: int, rank: int = 4, swapped: bool = False) -> ExpertAdapter:
    entries = [TensorEntry(Path("f"), "F32", shape, 0, 0, Path("f")) for shape in ((rows, width), (out, rows))]
    return ExpertAdapter(*entries, rank=rank, alpha=8.0, root=False, swapped=swapped)


def test_rows_of_a_are_blocks_and_columns_of_b_have_a_stride() -> None:
    """Against peft's own arithmetic (ParamWrapper.get_delta_weight)."""
    A, B = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    a, b = in_file(A, B)
    assert a.shape == (6, 5) and b.shape == (7, 6)
    peft = torch.einsum("o r e, e r i -> e o i", b.reshape(7, -1, 3), a.reshape(3, -1, 5))
    assert torch.allclose(peft, torch.einsum("ero,eri->eoi", B, A))
    assert torch.allclose(peft[1], b[:, 1::3] @ a[2:4])
    assert all(map(torch.equal, of_file(a, b, 3), (A, B)))


def test_names_follow_the_order_of_the_module_s_parameters() -> None:
    both = names_in_file(["a.experts.down_proj", "a.experts.gate_up_proj"])
    assert both == {"a.experts.down_proj": "a.experts", "a.experts.gate_up_proj": "a.experts.base_layer"}
    assert names_in_file(["a.experts.gate_up_proj"]) == {"a.experts.gate_up_proj": "a.experts"}
    assert names_in_file(["a.experts.up_proj", "a.experts.down_proj"])["a.experts.up_proj"] == "a.experts.base_layer"


@pytest.mark.parametrize("family", MIXTURES)
def test_that_order_is_the_families_own(family: str) -> None:
    """peft wraps parameters as `named_parameters` gives them."""
    with torch.device("meta"):
        model = make_model(make_config(family))
    for name, module, _ in projections(model):
        leaves = [leaf for leaf, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
        assert leaves == sorted(leaves, key=PROJECTIONS.index), name


def test_targets_are_ends_of_names_where_they_mean_no_other() -> None:
    names = ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"]
    assert targets_of(names, [*names, "model.layers.0.mlp.down_proj.weight"]) == ["experts.down_proj"]
    assert targets_of(names[:1], names) == names[:1]


@pytest.mark.parametrize(
    ("found", "transposed", "reason"),
    [
        (adapter(12, 5, 7), False, ""),
        (adapter(12, 7, 5), False, "in and out exchanged"),
        (adapter(12, 7, 5), True, ""),
        (adapter(12, 5, 7), True, "is of 3 experts of"),
        (adapter(8, 5, 7), False, "is of 2 experts of"),
        (adapter(12, 5, 7, swapped=True), False, ""),
    ],
)
def test_sides_are_told_by_attributes_and_never_guessed(found: ExpertAdapter, transposed: bool, reason: str) -> None:
    """The base's parameter is (3, 7, 5): 7 out and 5 in, or transposed 7 in and 5 out."""
    said = found.misfit((3, 7, 5), transposed)
    assert said.startswith(reason) if not reason else reason in said
    assert bool(said) is bool(reason)


def test_a_square_projection_of_an_exchanging_peft_does_not_fit() -> None:
    assert "exchanged" in adapter(12, 6, 6, swapped=True).misfit((3, 6, 6), False)
    assert adapter(12, 6, 6, swapped=True).misfit((3, 6, 6), True) == ""
    assert adapter(12, 6, 6).misfit((3, 6, 6), False) == ""
