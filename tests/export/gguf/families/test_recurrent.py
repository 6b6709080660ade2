"""Families that carry a state: llama.cpp computes what transformers does, sees each fault; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.export.gguf.architectures import lay_out
from qlora.export.gguf.families.recurrent import FAMILIES
from tests.export.gguf.cases import shapes_of
from tests.export.gguf.families.cases import Case, check, marked, refused, tiny
from tests.export.gguf.families.recurrent_cases import CASES, ROPE

# A state, kernels, one weight that is two tensors; value heads in another order, also of columns.
FAST = ("granitemoehybrid", "qwen3_5_text")
PAIRS = {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 0, 0]}


@pytest.mark.parametrize("case", marked(CASES, FAMILIES, FAST))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_changes_are_undone(case: Case) -> None:
    """Rows of the file, put together, are the parameter again; a weight in two tensors is wholly in them."""
    model = tiny(case)
    seen: dict[str, int] = {}
    for tensor in lay_out(model, shapes_of(model)).tensors:
        first, last = tensor.taken
        rows = model.get_parameter(tensor.parameter).detach()
        rows = rows[first:last] if tensor.place else rows
        written = tensor.to_gguf(rows)
        assert written.reshape(tensor.shape).shape == written.shape, tensor.name
        assert torch.allclose(tensor.inverse(written), rows, rtol=1e-5, atol=1e-7), tensor.name
        seen[tensor.parameter] = seen.get(tensor.parameter, 0) + rows.numel()
    assert seen == {name: parameter.numel() for name, parameter in model.named_parameters() if name in seen}
    assert seen.keys() == shapes_of(model).keys()


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias = True"),
        ("granitemoehybrid", {"time_step_limit": [0.1, 9.0]}, "time_step_limit"),
        ("falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ("falcon_h1", {"tie_word_embeddings": True}, "head is its embedding, with another multiplier"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias = True"),
        ("qwen3_5_text", {"linear_key_head_dim": 8}, "value heads of 16 and keys of 8 dims"),
        (
            "qwen3_5_text",
            {"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"]},
            "these layer_types of qwen3_5",
        ),
        ("qwen3_5_text", {"rope_parameters": PAIRS}, r"mrope_section = \[8, 0, 0\]"),
        ("lfm2", {"conv_bias": True}, "conv_bias = True"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    refused(CASES, model_type, fields, message)
