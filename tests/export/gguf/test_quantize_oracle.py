"""Types and bytes of every tensor against llama.cpp's own `llama_model_quantize`, on models of random weights.

The encoders are llama-cpp-python's own ggml here, since another build of ggml may round a search's sums otherwise; how
far the two builds differ is the last test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize

from qlora.export.gguf.encode import encode
from qlora.export.gguf.quant_mixes import QUANTS, MixHparams, choose_types
from qlora.export.llama_cpp import library

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle: pip install llama-cpp-python (it compiles llama.cpp)")


@dataclass(frozen=True)
class Shape:
    """A model of random weights. The quantizer looks at columns only, so all matrices have `rows` rows, to be quick."""

    arch: str
    layers: int
    width: int = 256
    wide: int = 512
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    rows: int = 16


SHAPES = {
    "llama-middling": Shape("llama", 4, width=512, wide=1536, rows=300),
    "llama-2-layers-tied": Shape("llama", 2, tied=True),
    "llama-8-layers": Shape("llama", 8),
    "llama-16-layers-grouped-by-4": Shape("llama", 16, heads=8, kv_heads=2),
    "llama-19-layers-grouped-by-3": Shape("llama", 19, heads=6, kv_heads=2),
    "llama-80-layers-grouped": Shape("llama", 80, kv_heads=1, rows=3),
    "llama-80-layers-ungrouped": Shape("llama", 80, kv_heads=4, rows=3),
    "llama-rows-of-320": Shape("llama", 9, width=320, wide=544),
    "llama-rows-of-72": Shape("llama", 2, width=72, wide=144),
    "llama-one-row": Shape("llama", 2, rows=1),
    "qwen2": Shape("qwen2", 8, tied=True),
    "qwen2-80-layers": Shape("qwen2", 80, kv_heads=4, rows=3),
    "qwen2-rows-of-320": Shape("qwen2", 3, width=320),
    "qwen3": Shape("qwen3", 9),
    "qwen3-80-layers-tied": Shape("qwen3", 80, tied=True, rows=3),
    "gemma2": Shape("gemma2", 26, tied=True),
    "gemma3": Shape("gemma3", 18, tied=True, kv_heads=1),
    "gemma3-rows-of-320": Shape("gemma3", 6, width=320, wide=640, tied=True),
    "phi3": Shape("phi3", 32, kv_heads=4),
    "phi3-rows-of-320": Shape("phi3", 8, width=320, kv_heads=4),
}

COMMON = ("attn_norm", "ffn_norm", "attn_output", "ffn_down", "ffn_up")
SEPARATE = ("attn_q", "attn_k", "attn_v", "ffn_gate")
# Names that llama.cpp's converter gives the tensors of a layer.
LAYER_WEIGHTS = {
    "llama": (*COMMON, *SEPARATE),
    "qwen2": (*COMMON, *SEPARATE),
    "qwen3": (*COMMON, *SEPARATE, "attn_q_norm", "attn_k_norm"),
    "gemma2": (*COMMON, *SEPARATE, "post_attention_norm", "post_ffw_norm"),
    "gemma3": (*COMMON, *SEPARATE, "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"),
    "phi3": (*COMMON, "attn_qkv"),
}
ELSEWHERE = {"llama": ("rope_freqs",), "phi3": ("rope_factors_long", "rope_factors_short")}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes, as torch has them, of a model of `shape.arch`."""

    def size(role: str) -> tuple[int, ...]:
        if role.endswith("_norm") or role.startswith("rope"):
            return (shape.width,)
        return (shape.rows, shape.wide if role == "ffn_down" else shape.width)

    roles = ("token_embd", "output_norm", *(() if shape.tied else ("output",)), *ELSEWHERE.get(shape.arch, ()))
    shapes = {f"{role}.weight": size(role) for role in roles}
    for layer in range(shape.layers):
        shapes |= {f"blk.{layer}.{role}.weight": size(role) for role in LAYER_WEIGHTS[shape.arch]}
        if shape.arch == "qwen2":
            shapes |= {f"blk.{layer}.attn_{which}.bias": (shape.width,) for which in "qkv"}
    return shapes


def random_weights(shape: Shape) -> dict[str, np.ndarray]:
    """Normal values, some columns much larger, as in trained models."""
    dice = np.random.default_rng(shape.layers * 1000 + shape.width)
    weights = {}
    for name, size in tensor_shapes(shape).items():
        columns = np.exp(dice.normal(0, 0.7, size[-1]))
        weights[name] = (dice.normal(0, 0.02, size) * columns).astype(np.float32)
    return weights


def write_f32(path: Path, shape: Shape, weights: Mapping[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, shape.arch)
    writer.add_context_length(128)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.wide)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(64)
    writer.add_vocab_size(320)
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llama_cpp(source: Path, quant: str, importance: Mapping[str, np.ndarray]) -> dict[str, tuple[int, np.ndarray]]:
    """What llama.cpp makes of `source`: type and bytes of each tensor."""
    target = source.with_name(f"{quant}-{len(importance)}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTS[quant].file_type
    params.nthread = 1
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, empty, ends the list
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    reader = GGUFReader(target)
    assert reader.fields["general.file_type"].contents() == QUANTS[quant].file_type
    found = {t.name: (int(t.tensor_type), t.data.reshape(-1).view(np.uint8).copy()) for t in reader.tensors}
    target.unlink()
    return found


def differences(
    shape: Shape,
    weights: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, np.ndarray]],
    quant: str,
    importance: Mapping[str, np.ndarray],
    library: library.Ggml,
) -> list[str]:
    """Every tensor whose type or bytes are not llama.cpp's."""
    hparams = MixHparams(shape.layers, shape.heads, shape.kv_heads)
    sizes = [(name, values.shape) for name, values in weights.items()]
    types = choose_types(quant, shape.arch, hparams, sizes, bool(importance)).types
    assert set(types) == set(expected)
    found = []
    for name, values in weights.items():
        kind, data = expected[name]
        if types[name] != kind:
            found.append(f"{name}: {types[name].name} instead of {GGMLQuantizationType(kind).name}")
        elif not np.array_equal(
            encode(torch.from_numpy(values), types[name], library, importance.get(name)).ravel(), data
        ):
            found.append(f"{name}: other bytes of {types[name].name}")
    return found


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    @llama_cpp.llama_log_callback
    def drop(level: int, text: bytes, data: Any) -> None:
        return None

    llama_cpp.llama_log_set(drop, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def own_ggml() -> library.Ggml:
    folder = Path(llama_cpp.__file__).parent / "lib"
    return library.open_library(
        next(path for path in folder.glob("*ggml-base.*") if path.suffix in (".so", ".dylib", ".dll"))
    )


def importance_of(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean squared inputs over four powers of ten, for every matrix but the embedding."""
    dice = np.random.default_rng(7)
    matrices = [name for name, values in weights.items() if values.ndim == 2 and name != "token_embd.weight"]
    return {name: np.exp(dice.normal(0, 2, weights[name].shape[1])).astype(np.float32) for name in matrices}


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_llama_cpps(name: str, own_ggml: library.Ggml, tmp_path: Path) -> None:
    shape = SHAPES[name]
    weights = random_weights(shape)
    source = tmp_path / "f32.gguf"
    write_f32(source, shape, weights)
    for importance in ({}, importance_of(weights)):
        for quant in QUANTS:
            expected = by_llama_cpp(source, quant, importance)
            found = differences(shape, weights, expected, quant, importance, own_ggml)
            assert not found, f"{quant}, {'with' if importance else 'without'} imatrix: {found[:5]} of {len(found)}"


def test_another_build_of_ggml_makes_the_same_or_as_good(own_ggml: library.Ggml) -> None:
    pytest.importorskip("xllamacpp", reason="the other build of ggml: pip install 'qlora[gguf]'")
    other = library.find_library()
    assert other.path != own_ggml.path
    values = torch.from_numpy(random_weights(SHAPES["llama-middling"])["blk.0.ffn_down.weight"])
    for kind in (GGMLQuantizationType[name] for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q5_0", "IQ4_NL")):
        ours, theirs = encode(values, kind, other), encode(values, kind, own_ggml)
        assert (ours == theirs).mean() > 0.999
        errors = [float(((dequantize(data, kind) - values.numpy()) ** 2).mean()) for data in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
