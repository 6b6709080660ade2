"""Bytes of GGUF tensors: ours against the gguf package's encoders and against ggml itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from torch import Tensor

from qlora.errors import ExportError
from qlora.export.gguf import encode as encoders
from qlora.export.gguf.encode import NATIVE, encode
from qlora.export.llama_cpp import library as llama_cpp_library

KINDS = {kind.name: kind for kind in GGMLQuantizationType}
THROUGH_GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# Root mean squared error over the values' own, of normal values without an importance: a little above what is seen.
EXPECTED_ERROR = {"Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q4_K": 0.08, "Q3_K": 0.16, "IQ4_XS": 0.08, "Q5_0": 0.05}


def rows(count: int = 48, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def awkward_rows() -> Tensor:
    """Zeros, signed zeros, halves at every code, float16's limits, numbers whose inverse overflows."""
    halves = torch.arange(-127, 127) + 0.5
    # The largest of each block is 127: the scale is 1, and the values stand exactly between two codes.
    full = torch.full((9, 1), 127.0)
    halves_of_blocks = torch.cat((full, torch.cat((halves, torch.zeros(9 * 31 - 254))).view(9, 31)), dim=1)
    others = torch.stack(
        (
            torch.zeros(32),
            -torch.zeros(32),
            torch.full((32,), 1e-38),
            torch.full((32,), 1e-42),
            torch.linspace(-3e-37, 3e-37, 32),
            torch.full((32,), 65504.0 * 127),
            torch.linspace(-6e-8, 6e-8, 32),
        )
    )
    below_half = torch.full((1, 32), float(np.nextafter(np.float32(0.5), np.float32(0))))
    below_half[0, 0] = 127.0
    return torch.cat((halves_of_blocks, others, below_half)).contiguous()


@pytest.fixture(scope="module")
def library() -> llama_cpp_library.Ggml:
    pytest.importorskip("xllamacpp", reason="carries ggml: pip install 'qlora[gguf]'")
    return llama_cpp_library.find_library()


def by_ggml(library: llama_cpp_library.Ggml, values: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((values.shape[0], values.shape[1] // block * size), dtype=np.uint8)
    assert library.quantize(kind, values.numpy(), out, None)
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_ours_equal_the_gguf_packages(kind: str) -> None:
    expected = quantize(rows().numpy(), KINDS[kind]).view(np.uint8)
    got = encode(rows(), KINDS[kind])
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("values", [rows(3000, 384), awkward_rows()], ids=["normal", "awkward"])
def test_our_q8_0_equals_ggmls(library: llama_cpp_library.Ggml, values: Tensor) -> None:
    expected = by_ggml(library, values, KINDS["Q8_0"])
    assert np.array_equal(encode(values, KINDS["Q8_0"]), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_our_16_bit_types_equal_ggmls(library: llama_cpp_library.Ggml, kind: str) -> None:
    subnormal = torch.linspace(-7e-5, 7e-5, 4096)[None]
    ties = torch.arange(0x3F800000, 0x3F800000 + (4096 << 9), 1 << 9, dtype=torch.int32).view(torch.float32)[None]
    values = torch.cat((rows(8, 4096), subnormal, ties))
    assert np.array_equal(encode(values, KINDS[kind]), by_ggml(library, values, KINDS[kind]))


def test_halves_to_even_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The awkward rows tell C's rounding from torch's and from adding a whole half: the comparison above can fail."""
    right = encode(awkward_rows(), KINDS["Q8_0"])
    monkeypatch.setattr(encoders, "BELOW_HALF", 0.5)
    assert not np.array_equal(encode(awkward_rows(), KINDS["Q8_0"]), right)
    blocks = awkward_rows()[:9]
    codes = right[:9, 2:].view(np.int8)
    assert np.array_equal(codes, quantize(blocks.numpy(), KINDS["Q8_0"])[:, 2:].view(np.int8))
    assert not np.array_equal(codes, torch.round(blocks).to(torch.int8).numpy())


@pytest.mark.parametrize("kind", sorted(EXPECTED_ERROR))
def test_what_is_read_back_is_near(library: llama_cpp_library.Ggml, kind: str) -> None:
    values = rows()
    back = dequantize(encode(values, KINDS[kind], library), KINDS[kind])
    error = np.sqrt(np.mean((back - values.numpy()) ** 2)) / values.std().item()
    assert EXPECTED_ERROR[kind] / 4 < error < EXPECTED_ERROR[kind]


@pytest.mark.parametrize("kind", (*THROUGH_GGML, *sorted(kind.name for kind in NATIVE)))
def test_blocks_of_rows_give_the_bytes_of_the_whole(
    library: llama_cpp_library.Ggml, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    values, (block, size) = rows(50, 512), GGML_QUANT_SIZES[KINDS[kind]]
    whole = encode(values, KINDS[kind], library)
    assert whole.shape == (50, 512 // block * size)
    monkeypatch.setattr(encoders, "GGML_PIECE", 3 * 512)
    monkeypatch.setattr(encoders, "NATIVE_PIECE", 3 * 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    parts = [encode(values[start:end], KINDS[kind], library) for start, end in ((0, 7), (7, 8), (8, 50))]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q3_K", "IQ4_XS", "Q5_0"])
def test_importance_lowers_the_weighted_error(library: llama_cpp_library.Ggml, kind: str) -> None:
    values = rows()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)).pow(4).numpy() + 1e-3

    def weighted_error(data: np.ndarray) -> float:
        return float((((dequantize(data, KINDS[kind]) - values.numpy()) ** 2) * importance).mean())

    with_it = weighted_error(encode(values, KINDS[kind], library, importance))
    assert with_it < 0.95 * weighted_error(encode(values, KINDS[kind], library))


def test_one_dimension_stays_one() -> None:
    values = rows(1, 64)[0]
    assert np.array_equal(encode(values, KINDS["F32"]).view(np.float32), values.numpy())
    assert encode(values, KINDS["F16"]).shape == (128,)


def test_rows_that_are_not_contiguous() -> None:
    values = rows(64, 64)
    assert np.array_equal(encode(values.T, KINDS["Q8_0"]), encode(values.T.contiguous(), KINDS["Q8_0"]))


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(kind: str, bad: float) -> None:
    values = rows(4, 64)
    values[2, 40] = bad
    with pytest.raises(ExportError, match=r"blk\.0\.attn_q\.weight: holds values that are not finite"):
        encode(values, KINDS[kind], name="blk.0.attn_q.weight")


@pytest.mark.parametrize(("kind", "largest"), [("F16", 65520.0), ("Q8_0", 127 * 65519.0)])
def test_values_beyond_float16_are_refused(kind: str, largest: float) -> None:
    values = rows(4, 64)
    values[1, 1] = -largest
    with pytest.raises(ExportError, match="too large for"):
        encode(values, KINDS[kind])
    values[1, 1] = -float(np.nextafter(np.float32(largest), np.float32(0)))
    assert np.isfinite(dequantize(encode(values, KINDS[kind]), KINDS[kind])).all()


def test_a_scale_that_overflows_is_refused(library: llama_cpp_library.Ggml) -> None:
    with pytest.raises(ExportError, match="a weight: a block's scale overflows in Q4_K"):
        encode(rows(4, 256) * 1e8, KINDS["Q4_K"], library)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_0"])
def test_columns_without_importance_are_not_zeroed(library: llama_cpp_library.Ggml, kind: str) -> None:
    """As they would be by ggml: a calibration text that never wakes a neuron must not delete its weights."""
    values = rows()
    importance = np.ones(512, np.float32)
    importance[256:] = 0
    raw = np.empty((48, 512 // GGML_QUANT_SIZES[KINDS[kind]][0] * GGML_QUANT_SIZES[KINDS[kind]][1]), dtype=np.uint8)
    library.quantize(KINDS[kind], values.numpy(), raw, importance)
    if kind != "Q4_K":
        assert not dequantize(raw, KINDS[kind])[:, 256:].any()
    back = dequantize(encode(values, KINDS[kind], library, importance), KINDS[kind])
    assert np.array_equal(back, dequantize(encode(values, KINDS[kind], library, np.ones(512, np.float32)), KINDS[kind]))
    nothing = encode(values, KINDS[kind], library, np.zeros(512, np.float32))
    assert np.array_equal(nothing, encode(values, KINDS[kind], library))


@pytest.mark.parametrize("importance", [np.ones(511, np.float32), np.full(512, np.nan, np.float32)])
def test_an_importance_that_does_not_fit_is_refused(library: llama_cpp_library.Ggml, importance: np.ndarray) -> None:
    with pytest.raises(ExportError, match="its importance has shape"):
        encode(rows(), KINDS["Q4_K"], library, importance)
