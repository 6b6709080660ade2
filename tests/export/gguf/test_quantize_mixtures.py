"""Mixtures: types and bytes of every tensor against llama.cpp's own `llama_model_quantize`, weighted and not.

llama.cpp quantizes our F32 file; our writer makes the same quant of the same base, encoded by that library's own ggml.
The oracle is the libllama of a prebuilt package (`pip install --no-deps llama-cpp-py-sync`), asked through ctypes.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from qlora.events import Recorder
from qlora.export.gguf.plan import GgufPlan, Tokens, plan
from qlora.export.gguf.quant_mixes import QUANTS
from qlora.export.llama_cpp import library
from qlora.model.resolve import resolve
from tests import mixtures
from tests.export.gguf import written

pytestmark = pytest.mark.slow
PACKAGE = importlib.util.find_spec("llama_cpp_py_sync")
if PACKAGE is None:
    pytest.skip("the oracle: pip install --no-deps llama-cpp-py-sync", allow_module_level=True)
FOLDER = Path(str(PACKAGE.origin)).parent
SHAPE: Mapping[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 256}
ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 5e4}
LATENT = {"head_dim": 16, "q_lora_rank": 256, "kv_lora_rank": 256, "first_k_dense_replace": 1}
# Eight experts and other numbers; rows that fit K-quants and rows of 96, that do not; stacks by head; shared experts.
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_moe, 8": ("qwen3_moe", {"norm_topk_prob": True, "moe_intermediate_size": 96}),
    "qwen3_moe, 5": ("qwen3_moe", {"norm_topk_prob": True, "moe_intermediate_size": 256, "num_experts": 5}),
    "mixtral, 8": ("mixtral", {"num_local_experts": 8, "intermediate_size": 96, "sliding_window": None}),
    "granitemoeshared, 4": ("granitemoeshared", {"shared_intermediate_size": 256}),
    "gpt_oss, 4": ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 96}),
    "deepseek_v3, 6": ("deepseek_v3", {**LATENT, "n_routed_experts": 6, "moe_intermediate_size": 96}),
}
K_QUANTS = [name for name, quant in QUANTS.items() if quant.needs_library]


class Params(ctypes.Structure):
    """llama.h, struct llama_model_quantize_params (2026-10)."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *(
            (name, ctypes.c_bool)
            for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
        ),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", ctypes.c_size_t),
    ]


class Importance(ctypes.Structure):
    """llama.h, struct llama_model_imatrix_data."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


@pytest.fixture(scope="module")
def llama() -> ctypes.CDLL:
    for name in ("libggml-base.so.0", "libggml-cpu.so.0", "libggml-rpc.so.0", "libggml.so.0"):
        ctypes.CDLL(str(FOLDER / name), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(FOLDER / "libllama.so"))
    found.llama_model_quantize_default_params.restype = Params
    found.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
    found.llama_model_quantize.restype = ctypes.c_uint32
    return found


def by_llama_cpp(
    llama: ctypes.CDLL, source: Path, quant: str, importance: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, np.ndarray]]:
    """What llama.cpp makes of `source`: type and bytes of each tensor."""
    target = source.with_name(f"{quant}-{len(importance)}.gguf")
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = QUANTS[quant].file_type, 1
    flat = {name: np.ascontiguousarray(values.reshape(-1)) for name, values in importance.items()}
    entries = (Importance * (len(flat) + 1))()  # the last one, empty, ends the list
    for entry, (name, values) in zip(entries, flat.items(), strict=False):
        entry.name, entry.size, entry.data = name.encode(), values.size, values.ctypes.data
    if importance:
        params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return stored(target)


def stored(file: Path) -> dict[str, tuple[int, np.ndarray]]:
    reader = GGUFReader(file)
    return {one.name: (int(one.tensor_type), one.data.reshape(-1).view(np.uint8).copy()) for one in reader.tensors}


def importance_of(planned: GgufPlan) -> dict[str, np.ndarray]:
    """Mean squared inputs over four powers of ten, of experts each one's own; the first expert has seen nothing."""
    dice = np.random.default_rng(7)
    found = {}
    for tensor in planned.layout.tensors:
        size = tensor.stored[-1:] if len(tensor.stored) == 2 else (tensor.stored[0], tensor.stored[-1])
        if tensor.name in found or tensor.name in ("token_embd.weight", "output.weight") or len(tensor.stored) < 2:
            continue
        if len(tensor.stored) == 3 and not tensor.projection:  # by head, which is not measured
            continue
        values = np.exp(dice.normal(0, 2, size)).astype(np.float32)
        if len(size) == 2:
            values[0] = 1.0
        found[tensor.name] = values
    return found


def test_the_oracle_is_asked_as_it_is_laid_out(llama: ctypes.CDLL) -> None:
    """Defaults at their places: a structure of another version would show here."""
    params = llama.llama_model_quantize_default_params()
    assert (params.ftype, params.quantize_output_tensor, params.pure) == (7, True, False)
    assert params.output_tensor_type == params.token_embedding_type > 30 and not params.imatrix


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_llama_cpps(name: str, llama: ctypes.CDLL, tmp_path: Path) -> None:
    family, fields = SHAPES[name]
    overrides = copy.deepcopy({**SHAPE, "rope_parameters": ROPE, **fields})
    base = resolve(str(mixtures.make_base(family, tmp_path / "base", overrides=overrides)), "main", Recorder())
    tensors = written.plain_tensors(base)
    own_ggml = library.open_library(FOLDER / "libggml-base.so.0")
    planned = plan(base, None, Tokens(), ("f32",))
    source = written.write_planned(base, planned, tensors, tmp_path / "f32")["f32"]
    for importance in ({}, importance_of(planned)):
        quants = [quant for quant in K_QUANTS if quant != "mxfp4_moe" or not importance]
        own = replace(plan(base, None, Tokens(), quants, bool(importance)), library=own_ggml)
        files = written.write_planned(base, own, tensors, tmp_path / f"own{len(importance)}", importance)
        for quant in quants:
            wanted, found = by_llama_cpp(llama, source, quant, importance), stored(files[quant])
            assert wanted.keys() == found.keys()
            wrong = [
                f"{key}: {GGMLQuantizationType(found[key][0]).name}, not {GGMLQuantizationType(kind).name}"
                for key, (kind, data) in wanted.items()
                if found[key][0] != kind or not np.array_equal(found[key][1], data)
            ]
            assert not wrong, f"{quant}, {'with' if importance else 'without'} importance: {wrong[:5]} of {len(wrong)}"
