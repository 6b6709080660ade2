"""Blocks of rows give what bitsandbytes gives for the whole weight, and plain torch gives the same codes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from blake3 import blake3

from qlora.model import nf4
from qlora.model.nf4 import (
    BLOCK,
    dequantize,
    quantize_rows,
    row_reader,
    row_unit,
    rows_in_block,
)
from qlora.third_party import import_bitsandbytes
from tests.card import Card, Stream, rehearsal
from tests.model.conftest import CPU
from tests.model.nf4_reference import quantize, reference_dequantize, reference_quantize, unpack, values_of

# Rows that end inside a block of 64, odd numbers of values, one value, a last block that is not full.
SHAPES = ((64, 64), (128, 100), (33, 65), (7, 3), (1, 1), (1, 64), (1000, 67), (5, 1000), (256, 4096), (301, 255))
KINDS = tuple(itertools.product(("nf4", "fp4"), (True, False)))


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_blocks_of_rows_equal_the_whole(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    for quant_type, double in KINDS:
        data, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double, blocksize=BLOCK)
        ours = quantize_rows(lambda a, b: weight[a:b], shape, quant_type, double, CPU, values_per_block=1)
        assert torch.equal(ours.data, data)
        assert torch.equal(ours.state.absmax, state.absmax)
        assert (ours.state.shape, ours.state.dtype, ours.state.blocksize) == (weight.shape, dtype, BLOCK)
        assert ours.state.nested == double
        if double:
            assert torch.equal(ours.state.offset, state.offset)
            assert torch.equal(ours.state.state2.absmax, state.state2.absmax)
        assert torch.equal(dequantize(ours, dtype), bnb.dequantize_4bit(data, state).reshape(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reference_gives_every_code(shape: tuple[int, int], quant_type: str) -> None:
    weight = weight_of(shape)
    ours = quantize(weight, quant_type, False, CPU)
    codes, absmax = reference_quantize(weight, quant_type)
    assert torch.equal(codes, unpack(ours.data, weight.numel()))
    assert torch.equal(absmax, ours.state.absmax)
    assert torch.equal(reference_dequantize(codes, absmax, shape, quant_type), dequantize(ours, torch.float32))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(quant_type: str) -> None:
    assert torch.equal(values_of(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


def test_zeros_and_one_large_value() -> None:
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    weight[2, 5] = 3.0
    for quant_type, double in KINDS:
        assert torch.allclose(
            dequantize(quantize(weight, quant_type, double, CPU), torch.float32), weight.float(), atol=0.02
        )


def awkward(kind: str) -> torch.Tensor:
    """Weights (n, 64) in float32 that stand near the edges of the code, of floating point, or of both."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(2100, 64, generator=generator)  # more than one stretch, and a short one
    if kind == "uniform":
        return torch.rand(2100, 64, generator=generator) * 2 - 1
    if kind == "ties":  # scaled values on every midpoint and one step of fp32 beside it, for both codes
        midpoints = torch.cat([(v[:-1] + v[1:]) / 2 for v in (values_of("nf4"), values_of("fp4").sort().values)])
        beside = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
        values = torch.nn.functional.pad(torch.cat(beside), (1, 5), value=1.0)
        return values[torch.randint(len(values), (500, 64), generator=generator)].index_fill(1, torch.tensor(7), 1.0)
    if kind == "sparse":
        return normal * (torch.rand(2100, 64, generator=generator) < 0.05) * (torch.arange(2100) % 3 > 0)[:, None]
    scales = {"normal": 0.02, "huge": 1e37, "tiny": 1e-30, "below 1e-38": 1e-39, "denormal": 3e-45}
    return normal * scales[kind]


@pytest.mark.parametrize("kind", ["normal", "uniform", "ties", "sparse", "huge", "tiny", "below 1e-38", "denormal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_our_cpu_codes_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    weight = awkward(kind).to(dtype)  # "huge" is infinite in fp16
    for quant_type, double in KINDS:
        data, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double, blocksize=BLOCK)
        ours = quantize(weight, quant_type, double, CPU)
        assert torch.equal(ours.data, data)
        assert torch.equal(ours.state.absmax, state.absmax)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_block_without_a_trace(threads: int) -> None:
    weight = weight_of((1031, 191))
    expected, _ = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(quantize(weight, "nf4", False, CPU).data, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_left_to_bitsandbytes(value: float) -> None:
    weight = weight_of((64, 64))
    weight[3, 5] = value
    data, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    ours = quantize(weight, "nf4", False, CPU)
    assert torch.equal(ours.data, data) and torch.equal(ours.state.absmax, state.absmax) is not (value != value)


@pytest.mark.parametrize("shape", [(64, 64), (33, 65), (7, 3), (1, 1), (301, 255)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_card_gives_the_bytes_that_the_cpu_gives(
    shape: tuple[int, int], quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of zeros too, for which its kernel multiplies by 1 / 0 (kernels.cu, kQuantizeBlockwise): code 0 each, and
    an absmax of 0 in a last block that is not full as well.
    """
    weight = weight_of(shape)
    flat = weight.view(-1)
    flat[-(len(flat) % BLOCK or BLOCK) :] = 0.0
    flat[128:320] = -0.0
    expected = {double: quantize(weight, quant_type, double, CPU) for double in (True, False)}
    real_quantize = bnb.quantize_4bit

    def kernel(block: torch.Tensor, blocksize: int, quant_type: str) -> tuple[torch.Tensor, SimpleNamespace]:
        codes, _ = real_quantize(block, blocksize=blocksize, quant_type=quant_type)
        blocks = torch.nn.functional.pad(block.reshape(-1), (0, -block.numel() % BLOCK)).view(-1, BLOCK).abs().amax(1)
        (zeros,) = (blocks == 0).nonzero(as_tuple=True)
        for at in zeros.tolist():
            codes.view(-1)[at * BLOCK // 2 : (at + 1) * BLOCK // 2] = 0
        return codes, SimpleNamespace(absmax=blocks.float())

    monkeypatch.setattr(bnb, "quantize_4bit", kernel)
    monkeypatch.setattr(nf4, "is_card", lambda device: True)
    for double, cpu in expected.items():
        card = quantize(weight, quant_type, double, CPU)
        assert torch.equal(card.data, cpu.data) and torch.equal(card.state.absmax, cpu.state.absmax)
        if double:
            assert torch.equal(card.state.offset, cpu.state.offset)
            assert torch.equal(card.state.state2.absmax, cpu.state.state2.absmax)
        assert torch.equal(dequantize(card, torch.bfloat16), dequantize(cpu, torch.bfloat16))


def test_a_card_quantizes_on_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' kernel takes no stream: under another one it would read a block before it is there."""
    with rehearsal(monkeypatch, Card()) as card, card.stream(Stream(card)):
        quantize(weight_of((64, 64)), "nf4", True, CPU)
        assert card.calls["Stream.wait_stream"] == 2


@pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA build; no GPU")
@pytest.mark.parametrize("double", [True, False])
def test_cuda_tensors_without_a_card_are_quantized(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices, shapes and types: codes and constants end on the card, the constants are made on the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for stream in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, stream, lambda device: None)
    quantize(weight_of((64, 64)), "nf4", True, CPU)  # the table of midpoints is real
    with FakeTensorMode(allow_non_fake_inputs=True):  # bitsandbytes keeps its table
        cuda = torch.device("cuda", 0)
        weight = torch.empty(33, 65, dtype=torch.bfloat16)
        held = quantize_rows(lambda a, b: weight[a:b], (33, 65), "nf4", double, cuda)
        state = held.state
        seen = [str(tensor.device) for tensor in (held.data, state.absmax, state.code)]
        shapes = (held.data.shape, state.absmax.shape, state.absmax.dtype)
        if double:
            seen += [str(tensor.device) for tensor in (state.offset, state.state2.absmax, state.state2.code)]
    assert {*seen} == {"cuda:0"}
    assert shapes == ((1073, 1), (34,), torch.uint8 if double else torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_real_card_gives_the_bytes_that_the_cpu_gives(quant_type: str) -> None:
    weight = weight_of((301, 255))
    weight.view(-1)[128:320] = 0.0
    for double in (True, False):
        cpu, card = (quantize(weight, quant_type, double, torch.device(name)) for name in ("cpu", "cuda"))
        assert torch.equal(card.data.cpu(), cpu.data) and torch.equal(card.state.absmax.cpu(), cpu.state.absmax)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_read_back_as_they_are_in_the_whole(shape: tuple[int, int]) -> None:
    for quant_type, double in KINDS:
        held = quantize(weight_of(shape), quant_type, double, CPU)
        read, unit = row_reader(held, torch.bfloat16), row_unit(held)
        whole = dequantize(held, torch.bfloat16)
        spans = [(at, min(at + unit, shape[0])) for at in range(0, shape[0], unit)]
        for start, end in (*spans[:3], *spans[-2:], (0, shape[0])):
            assert torch.equal(read(start, end), whole[start:end])


@pytest.mark.parametrize("width", [16, 48, 80, 96, 100, 112, 176, 1000, 33])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_blocks_go_on_in_the_next_row(width: int, quant_type: str, dtype: torch.dtype) -> None:
    """A code's value times its block's constant, in fp32, rounded once: of rows that are no whole blocks too, and of
    weights that are none; read by the layer's own product as by ourselves."""
    for rows in (64, 7):
        quantized = quantize(weight_of((rows, width)), quant_type, False, CPU)
        state, codes = quantized.state, quantized.data.view(torch.uint8).reshape(-1)
        values = state.code[torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)[: rows * width].long()]
        plain = (values * state.absmax.repeat_interleave(state.blocksize)[: rows * width]).reshape(rows, width)
        assert torch.equal(dequantize(quantized, dtype), plain.to(dtype))
        if dtype != torch.float16:
            inputs = torch.eye(width, dtype=dtype)
            found = import_bitsandbytes().matmul_4bit(inputs, quantized.data.t(), state)
            assert torch.equal(found, plain.to(dtype).t())


def test_a_block_of_rows_is_whole_blocks_of_values() -> None:
    for columns in (1, 3, 64, 65, 100, 4096, 14336, 1 << 24):
        rows = rows_in_block(columns)
        assert rows * columns % BLOCK == 0 and rows >= 1
    assert rows_in_block(4096, 1 << 22) == 1024


def test_rows_are_read_once_and_in_order() -> None:
    weight = weight_of((1000, 67))
    asked: list[tuple[int, int]] = []

    def read(start: int, end: int) -> torch.Tensor:
        asked.append((start, end))
        return weight[start:end]

    quantize_rows(read, (1000, 67), "nf4", True, CPU, values_per_block=64 * 67 * 4)
    assert asked == [(0, 256), (256, 512), (512, 768), (768, 1000)]


def test_nbytes_is_what_the_format_promises() -> None:
    """4 bits a value, and for each 64 values 8 bits, and for each 256 of those 32: 4.127 bits (QLoRA, section 3)."""
    quantized = quantize(weight_of((256, 4096)), "nf4", True, CPU)
    tensors = (quantized.data, quantized.state.absmax, quantized.state.state2.absmax)
    assert sum(tensor.nbytes for tensor in tensors) * 8 / (256 * 4096) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


# Of the version's bytes. Bases are kept under it: whoever changes what a weight becomes raises `QUANTIZER`, and adds a
# line here.
BYTES_OF = {1: "43cf3b152278701534892ba5026da1c7e7e59108fd5f6641ad8f5d5a466dac30"}


def test_the_versions_bytes_are_the_ones_that_were_kept_under_it() -> None:
    digest = blake3()
    weight = ((torch.arange(300 * 130) * 7919 % 10007 - 5003).float() / 1e5).reshape(300, 130).bfloat16()
    weight[3] = 0
    weight[5] *= 1e-30  # of the least absmax that is divided by, the bytes tell as well
    for quant_type, double in KINDS:
        made = quantize_rows(lambda start, end: weight[start:end], (300, 130), quant_type, double, CPU)
        state = made.state
        parts = [made.data, state.absmax, state.code]
        parts += [state.state2.absmax, state.state2.code, state.offset.reshape(1)] if double else []
        for part in parts:
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == BYTES_OF[nf4.QUANTIZER]
