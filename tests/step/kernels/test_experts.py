"""The twins of the product with experts in 4 bit, which say what the kernel computes; and what a dispatch mode sees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qlora.step.kernels import experts
from qlora.step.kernels.experts import Packed

TABLE = torch.linspace(-1, 1, 16)
COUNT, OUT, WIDTH = 3, 16, 64


def packed_of(block: int, high_first: bool, powers: bool) -> tuple[Packed, Tensor]:
    """Experts, and their weights (E, out, in), value by value."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (COUNT, OUT * WIDTH // 2), generator=generator).to(torch.uint8)
    sizes = torch.rand(COUNT, OUT * WIDTH // block, generator=generator) + 0.5
    exponents = torch.randint(118, 136, sizes.shape, generator=generator).to(torch.uint8)
    weights = torch.empty(COUNT, OUT * WIDTH)
    for expert in range(COUNT):
        for place in range(OUT * WIDTH):
            byte, upper = int(codes[expert, place // 2]), (place % 2 == 0) == high_first
            power = 2.0 ** (int(exponents[expert, place // block]) - 127)
            constant = power if powers else float(sizes[expert, place // block])
            weights[expert, place] = TABLE[byte >> 4 if upper else byte & 15] * constant
    packed = Packed(codes, exponents if powers else sizes, TABLE, high_first)
    return packed, weights.view(COUNT, OUT, WIDTH)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("block", "high_first", "powers"), [(64, True, False), (32, False, True), (32, False, False)])
@pytest.mark.parametrize("rows", [(3, 4, 5), (0, 7, 0), (6, 0, 1), (0, 0, 0)])
def test_rows_are_multiplied_with_the_weight_of_their_expert(
    rows: tuple[int, ...], block: int, high_first: bool, powers: bool, back: bool
) -> None:
    packed, weights = packed_of(block, high_first, powers)
    ends = torch.tensor(rows).cumsum(0)
    given = torch.randn(sum(rows), OUT if back else WIDTH, generator=torch.Generator().manual_seed(1))
    parts = [given[start:end] for start, end in pairwise([0, *ends.tolist()])]
    right = [part @ (weight if back else weight.t()) for part, weight in zip(parts, weights, strict=True)]
    found = experts.grouped(given, packed, ends.int(), (OUT, WIDTH, block), back)
    torch.testing.assert_close(found, torch.cat(right))


def test_weights_are_rounded_to_the_type_of_the_rows_before_they_are_multiplied() -> None:
    """As a weight that is dequantized whole: else what is trained were not what is merged."""
    packed, weights = packed_of(64, True, False)
    given = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = experts.grouped(given, packed, torch.tensor([40, 40, 40]).int(), (OUT, WIDTH, 64), False)
    rounded, whole = ((given.float() @ one.t()).bfloat16() for one in (weights[0].bfloat16().float(), weights[0]))
    assert torch.equal(found, rounded) and not torch.equal(found, whole)


def test_constants_have_their_own_nested_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    absmax = torch.randint(0, 256, (2, 512), generator=generator).to(torch.uint8)
    nested, table, offset = torch.tensor([[0.5, 2.0], [3.0, 7.0]]), torch.linspace(-1, 1, 256), torch.tensor([0.1, 9.0])
    found = experts.unnest(absmax, nested, table, offset, 300)
    assert found.shape == (2, 300) and found.is_contiguous()
    for expert, block in ((0, 0), (0, 255), (0, 256), (1, 255), (1, 299)):
        right = table[int(absmax[expert, block])] * nested[expert, block // 256] + offset[expert]
        assert found[expert, block] == right


def test_shapes_that_a_tile_cannot_read_are_left_to_torch() -> None:
    assert experts.fits((128, 1536, 2048), 64) and experts.fits((32, 5760, 2880), 32)
    assert experts.fits((32, 5760, 2880), 64)  # gpt-oss in NF4: 45 blocks a row
    assert not experts.fits((8, 48, 80), 64)  # blocks run over the ends of rows
    assert not experts.fits((8, 24, 64), 64)  # of gradients, no row but the first begins at a whole 16 bytes
    assert not experts.fits((8, 48, 96), 48)  # a block is no whole number of steps
    assert not experts.fits((8, 1 << 16, 1 << 15), 64) and not experts.fits((5000, 64, 64), 64)


def test_tiles_follow_from_shapes_alone() -> None:
    """Forward and recomputation have the same; few rows, such as an answer's next token, have low ones."""
    assert experts.tile_rows(8, 128) == experts.tile_rows(2047, 128) == experts.FEW_ROWS
    assert experts.tile_rows(2048, 128) == experts.tile_rows(16384, 128) == experts.ROWS
    for count in (1, 2, 3, 128, 129, 512):
        shape = experts.tile(experts.ROWS, count, 64, True, False)
        assert count <= shape["EXPERTS"] <= 2 * max(count, 1) and shape["EXPERTS"] & (shape["EXPERTS"] - 1) == 0
        assert shape["BLOCK"] % shape["DEPTH"] == 0 and shape["COLUMNS"] % shape["BLOCK"] == 0


def test_on_meta_they_make_what_a_card_makes() -> None:
    """A result of its own, and nothing that would have to be read back."""
    rows = torch.empty(40, WIDTH, device="meta", dtype=torch.bfloat16)
    codes, ends = torch.empty(COUNT, 512, device="meta").byte(), torch.empty(COUNT, device="meta").int()
    absmax, nested = torch.empty(COUNT, 256, device="meta").byte(), torch.empty(COUNT, 1, device="meta")
    constants = experts.unnest(absmax, nested, torch.empty(256, device="meta"), torch.empty(3, device="meta"), 16)
    assert (constants.shape, constants.dtype) == ((COUNT, 16), torch.float32)
    packed = Packed(codes, constants, torch.empty(16, device="meta"), True)
    forth = experts.grouped(rows, packed, ends, (OUT, WIDTH, 64), False)
    back = experts.grouped(forth, packed, ends, (OUT, WIDTH, 64), True)
    assert [(one.shape, one.dtype) for one in (forth, back)] == [((40, OUT), rows.dtype), ((40, WIDTH), rows.dtype)]


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_route_is_a_stable_sort(tokens: int) -> None:
    index_TK = torch.randint(0, 4, (tokens, 3), generator=torch.Generator().manual_seed(0))
    expert_S, order_S, inverse_S, token_S, ends_E = experts.route(index_TK, 6)
    flat, number = index_TK.flatten(), torch.arange(3 * tokens)
    assert torch.equal(expert_S, flat.sort(stable=True).values) and torch.equal(flat[order_S], expert_S)
    same = expert_S[1:] == expert_S[:-1]
    assert bool((order_S[1:] > order_S[:-1])[same].all()) and torch.equal(order_S[inverse_S], number)
    assert torch.equal(token_S, order_S // 3)
    assert ends_E.dtype == torch.int32 and ends_E.tolist() == [int((flat <= one).sum()) for one in range(6)]
    on_meta = experts.route(index_TK.to("meta"), 6)
    found = (expert_S, order_S, inverse_S, token_S, ends_E)
    assert [(one.shape, one.dtype) for one in on_meta] == [(one.shape, one.dtype) for one in found]
