"""llama.cpp's C functions in the child: parameters that are laid out otherwise are never written over."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora.export.llama_cpp import runtime_child
from qlora.export.llama_cpp.runtime import find_runtime


def test_parameters_laid_out_otherwise_are_refused() -> None:
    """Defaults in other places must never be written over blindly."""
    pytest.importorskip("xllamacpp", reason='no llama.cpp to ask: pip install "qlora[gguf]"')
    found = find_runtime()
    assert found is not None
    opened = runtime_child.open_llama(found.library)
    defaults = opened.llama_context_default_params()
    raw = bytes(defaults.room)
    changed = bytes(runtime_child.context_parameters(defaults, 1000).room)
    assert struct.unpack_from("<4I", changed) == (1000, 512, 512, 1)
    assert sum(one != other for one, other in zip(raw, changed, strict=True)) < 24, "more than the known fields changed"
    for find, put in ((runtime_child._SIZES, bytes(16)), (runtime_child._CACHE_TYPES, bytes(40))):
        broken = runtime_child._Opaque()
        ctypes.memmove(broken.room, raw.replace(find, put), len(raw))
        with pytest.raises(runtime_child.Failed, match="laid out otherwise"):
            runtime_child.context_parameters(broken, 1000)
    shifted = runtime_child._Opaque()
    ctypes.memmove(shifted.room, bytes(4) + raw[:-4], len(raw))
    with pytest.raises(runtime_child.Failed, match="laid out otherwise"):
        runtime_child.context_parameters(shifted, 1000)


def test_log_probabilities_are_torchs_however_large_logits_are() -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3
    for shift in (0.0, 1e4):
        found = runtime_child.log_softmax((logits + shift).numpy())
        expected = torch.log_softmax((logits + shift).double(), 0).float().numpy()
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6


def test_a_library_without_llamas_functions_is_of_another_version() -> None:
    with pytest.raises(runtime_child.Failed, match="is of another version"):
        runtime_child.open_llama(Path(ctypes.util.find_library("m") or "libm.so.6"))
