"""Families whose layers see windows: llama.cpp computes what transformers does; what it cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.export.gguf.families.windowed import FAMILIES
from tests.export.gguf.cases import LLAMA3
from tests.export.gguf.families.cases import Case, check, marked, refused
from tests.export.gguf.families.dense_cases import CASES, ROPE, WINDOW

# Windows, layers without positions, one norm for both halves of a block; norms after, yarn in some layers.
FAST = ("cohere2", "olmo3")
TWO_BASES = {"full_attention": {**ROPE, "rope_theta": 1e6}, "sliding_attention": ROPE}


@pytest.mark.parametrize("case", marked(CASES, FAMILIES, FAST))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("olmo2", {"tie_word_embeddings": True}, "head is its embedding"),
        ("olmo2", {"attention_bias": True}, "no place for the tensor .*bias"),
        ("olmo2", {"rope_parameters": LLAMA3}, "'llama3' positions"),
        ("olmo3", {"rope_parameters": TWO_BASES}, "another rope_theta for the sliding layers"),
        ("cohere2", {"tie_word_embeddings": False}, "head is not its embedding"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "without sliding windows"),
        ("cohere2", {"logit_scale": 0.0}, "logit_scale = 0"),
        ("exaone4", {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2}, "windows in .* of 2 layers"),
        ("exaone4", {"sliding_window": WINDOW}, "no windows in .* of 2 layers"),
        ("exaone4", {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64}, "no windows in .* of 64 layers"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    refused(CASES, model_type, fields, message)
