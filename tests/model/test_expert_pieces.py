"""Which piece of which parameter a tensor of experts is, and what is wrong with pieces that do not make a whole."""

from __future__ import annotations

import pytest

from qlora.errors import ModelError
from qlora.model.expert_pieces import Piece, in_order, piece_of

PARAMETER = "model.layers.0.mlp.experts.gate_up_proj"


class MergeModulelist:
    dim = 0


class Concatenate:
    def __init__(self, dim: int = 1) -> None:
        self.dim = dim


class Converter:
    """In the place of transformers' WeightConverter."""

    def __init__(self, patterns: list[str], *operations: object) -> None:
        self.source_patterns, self.operations, self.target_patterns = patterns, operations, [".experts.gate_up_proj"]


W1, W3 = ".experts.*.w1.weight", ".experts.*.w3.weight"
MIXTRAL = Converter([W1, W3], MergeModulelist(), Concatenate())


def test_a_tensor_of_one_expert_is_its_rows() -> None:
    """The number is that behind "experts.": the layer's is another, and so is that of w1."""
    plain = "model.layers.7.mlp.experts.12.w3.weight"
    assert piece_of("stored", plain, W3, [MIXTRAL]) == Piece("stored", 12, 1, 2)
    assert piece_of("stored", plain, W1, [MIXTRAL]) == Piece("stored", 12, 0, 2)


@pytest.mark.parametrize(
    "converter",
    [
        Converter([W1, W3], Concatenate(0)),
        Converter([W1, W3], MergeModulelist(), Concatenate(0)),
        Converter([W1, W3], MergeModulelist()),
    ],
)
def test_what_transformers_makes_otherwise_is_no_piece(converter: Converter) -> None:
    assert piece_of("stored", "model.layers.7.mlp.experts.12.w3.weight", W3, [converter]) is None
    assert piece_of("stored", "model.layers.7.mlp.w3.weight", W3, [MIXTRAL]) is None


def pieces(experts: int = 3) -> list[Piece]:
    return [Piece(f"experts.{expert}.{part}", expert, part, 2) for expert in range(experts) for part in (0, 1)]


def test_pieces_are_sorted_by_expert_and_part_whatever_their_order() -> None:
    assert list(in_order("base", PARAMETER, 3, pieces()[::-1])) == pieces()


def test_a_missing_expert_is_named() -> None:
    with pytest.raises(ModelError) as refusal:
        in_order("base", PARAMETER, 3, [piece for piece in pieces() if piece.expert != 1])
    assert refusal.value.what == f"base: {PARAMETER}: expert 1, part 1 of 2 is missing, and 1 more"
    assert refusal.value.hint and refusal.value.exit_code == 2


def test_a_doubled_expert_is_named_with_both_tensors() -> None:
    with pytest.raises(ModelError, match=r"base: experts.2.1 and again are both expert 2, part 2 of 2 of"):
        in_order("base", PARAMETER, 3, [*pieces(), Piece("again", 2, 1, 2)])
    with pytest.raises(ModelError, match=r"whole and experts.0.0 hold the same expert"):
        in_order("base", PARAMETER, 3, [Piece("whole", None), *pieces()])
    with pytest.raises(ModelError, match="whole and twice hold the same expert"):
        in_order("base", PARAMETER, 3, [Piece("whole", None), Piece("twice", None)])


def test_an_expert_beyond_the_configuration_is_named() -> None:
    with pytest.raises(ModelError, match=r"experts.2.0 is of an expert beyond the 2 of config.json"):
        in_order("base", PARAMETER, 2, pieces())
