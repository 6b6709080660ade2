"""MXFP4 held as it is published: decoded to the bit as transformers does it, every code under every scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.memory.trace import LiveBytes
from qlora.model import mxfp4
from qlora.model.mxfp4 import Mxfp4Stack, decoded
from qlora.step.experts import PackedStack
from tests.mxfp4 import encode

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.dtype])


def all_there_are() -> tuple[Tensor, Tensor]:
    """Every byte of two codes under each of 256 scales: blocks (1, 256, 16, 16) and scales (1, 256, 16)."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16)
    return every.contiguous(), torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 16).contiguous()


def random(count: int = 4, out: int = 6, width: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (count, out, width // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (count, out, width // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def stack_of(blocks: Tensor, scales: Tensor) -> Mxfp4Stack:
    stack = Mxfp4Stack((len(blocks), blocks.shape[1], 32 * blocks.shape[2]))
    stack.allocate(torch.device("cpu"))
    for expert in range(len(blocks)):
        stack.put(expert, "blocks", blocks[expert])
        stack.put(expert, "scales", scales[expert])
    return stack


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("tensors", [all_there_are, random])
def test_values_are_transformers_own_to_the_bit(tensors: Any, dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = tensors()
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)  # theirs is (E, in, out)
    assert torch.equal(bits(decoded(blocks, scales, dtype)), bits(wanted))
    read = stack_of(blocks, scales).read(0, len(blocks), dtype)
    assert torch.equal(bits(read), bits(wanted))


def test_values_are_what_the_specification_says() -> None:
    """By its words alone: sign, exponent, mantissa, and a power of two with a bias of 127."""
    blocks, scales = all_there_are()
    found = decoded(blocks, scales, torch.float32)[0].double()
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        for scale in range(mxfp4.MOST_SCALE + 1):
            wanted = math.ldexp(-value if sign else value, scale - 127)
            low, high = found[scale, 2 * code], found[scale, 2 * (code << 4) + 1]  # bytes 0x0c and 0xc0
            assert float(low) == float(high) == wanted, (code, scale)


def test_the_largest_scale_that_is_taken_is_the_last_of_finite_values() -> None:
    blocks, scales = all_there_are()
    finite = torch.isfinite(decoded(blocks, scales, torch.bfloat16)[0]).all(dim=1)
    assert finite.nonzero().max() == mxfp4.MOST_SCALE


def test_any_range_of_experts_is_read_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(*random())
    whole = stack.read(0, 4, torch.bfloat16)
    monkeypatch.setattr(mxfp4, "PLACES_BYTES", 1)
    for first, last in ((0, 4), (1, 3), (3, 4), (2, 2)):
        assert torch.equal(stack.read(first, last, torch.bfloat16), whole[first:last])


def test_what_a_kernel_is_given_makes_the_same_values() -> None:
    """Codes, scales and table apart; the earlier value is in the low half of a byte."""
    stack = stack_of(*random())
    assert isinstance(stack, PackedStack)
    codes, scales, table, high_first = stack.packed()
    halves = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    values = table[torch.stack(halves, dim=-1).flatten(1).int()]
    constants = torch.exp2(scales.float() - 127).repeat_interleave(stack.block, dim=1)
    assert torch.equal((values * constants).view(stack.shape), stack.read(0, 4, torch.float32))


def test_encoding_what_was_decoded_gives_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks, scales = encode(torch.randn(3, 4, 64, generator=generator))
    again = encode(decoded(blocks, scales, torch.float32))
    assert torch.equal(again[0], blocks) and torch.equal(again[1], scales)


def test_a_value_takes_four_and_a_quarter_bits() -> None:
    stack = Mxfp4Stack((32, 5760, 2880))  # gpt-oss-20b's gate and up
    tables = sum(getattr(stack, name).nbytes for name in stack.TABLES)
    assert 8 * (stack.nbytes - tables) == 4.25 * math.prod(stack.shape) and tables == 64
    assert stack.nbytes == sum(buffer.nbytes for buffer in stack.buffers())


def test_reading_takes_a_bounded_room_beside_the_weights() -> None:
    """Of eight of gpt-oss' experts, 253 MiB in bf16: places of two of them, whatever is asked for."""
    live = LiveBytes("cpu")
    with live:
        stack = Mxfp4Stack((32, 5760, 2880))
        stack.allocate(torch.device("meta"))
        before = sum(live.live.values())
        live.begin("read")
        weights = stack.read(8, 16, torch.bfloat16)
    beside = live.peaks["read"].total - before - weights.nbytes
    assert 0 < beside <= mxfp4.PLACES_BYTES + (24 << 20)
