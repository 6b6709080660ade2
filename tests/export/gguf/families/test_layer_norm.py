"""Families with layer norms: llama.cpp computes what transformers does; what it cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.export.gguf.families.layer_norm import FAMILIES
from tests.export.gguf.families.cases import Case, check, marked, refused
from tests.export.gguf.families.dense_cases import CASES, HALF

FAST = ("phi", "nemotron")  # biases everywhere, of the head too; norms stored less 1


@pytest.mark.parametrize("case", marked(CASES, FAMILIES, FAST))
def test_a_familys_file_is_the_model_and_each_fault_is_seen(tmp_path: Path, case: Case) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("starcoder2", {"use_bias": False}, "use_bias = False of starcoder2"),
        ("starcoder2", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("starcoder2", {"rope_parameters": HALF}, "8 rotated dims of 16"),
        ("phi", {"tie_word_embeddings": True}, "head is its embedding"),
        ("phi", {"qk_layernorm": True}, "no place for the tensor .*q_layernorm"),
        ("nemotron", {"head_dim": 32}, "heads of 32 dims"),
        ("nemotron", {"tie_word_embeddings": True}, "head is its embedding"),
    ],
)
def test_what_its_graph_cannot_compute_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    refused(CASES, model_type, fields, message)
