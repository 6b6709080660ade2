"""The text part of a multimodal base, where it stands alone in transformers: its file is the text model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.export.gguf.plan import Tokens, plan
from qlora.model.resolve import resolve
from tests.export import llama
from tests.export.gguf import written
from tests.export.gguf.families.cases import EXACT, Case, divergence, make_base, rows
from tests.export.gguf.families.dense_cases import CASES as DENSE
from tests.export.gguf.families.gemma_cases import CASES as GEMMA
from tests.export.gguf.families.recurrent_cases import CASES as RECURRENT

PLAIN = {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": None}
WINDOWS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": True}
CASES = {case.name: case for case in (*DENSE, *GEMMA, *RECURRENT)}
WHOLES = {  # the type of the whole model, and its text part
    "mistral3": Case("mistral", PLAIN, {}),
    "mistral3 of Ministral": CASES["ministral3"],
    "gemma3": Case("gemma3_text", {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}, {}),
    "gemma3n": CASES["gemma3n_text"],
    "gemma4": CASES["gemma4_text"],
    "qwen3_5": CASES["qwen3_5_text"],
    "lfm2_vl": CASES["lfm2"],
}
FAST = ("mistral3", "qwen3_5")


def inside(text: Path, model_type: str) -> Path:
    """The base in `text` as the text part of a larger one, whose other parts are not stored."""
    from transformers import AutoConfig

    own = json.loads((text / "config.json").read_text())
    reference = written.transformers_model(text)
    whole = AutoConfig.for_model(model_type, text_config=own).to_dict()
    whole["text_config"] = own
    whole["tie_word_embeddings"] = own.get("tie_word_embeddings", reference.config.tie_word_embeddings)
    (text / "config.json").write_text(json.dumps(whole, default=str))
    tensors = load_file(text / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    save_file(named, text / "model.safetensors", metadata={"format": "pt"})
    return text


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in WHOLES]
)
def test_the_text_part_of_a_larger_model(tmp_path: Path, name: str) -> None:
    case = WHOLES[name]
    base = make_base(case, tmp_path / "base")
    model = written.transformers_model(base)
    case.adjust(model)
    reference = torch.cat([written.logprobs(model, row) for row in rows()])
    whole = resolve(str(inside(base, name.split()[0])), "main", Recorder())
    assert isinstance(whole.config["text_config"], dict)
    planned = plan(whole, None, Tokens(), ("f32",))
    file = written.write_planned(whole, planned, written.plain_tensors(whole), tmp_path / "out")["f32"]
    found = llama.logprobs(file, tuple((row, range(len(row))) for row in rows()))
    limit = 1e-5 if name == "gemma3" else EXACT  # its activation is a table of 16-bit values in llama.cpp
    assert divergence(reference, found) <= limit


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_text_part_that_transformers_has_not_alone_is_refused_by_name(tmp_path: Path, model_type: str) -> None:
    """Before a weight is read: these have no causal model of their own."""
    from transformers import AutoConfig

    config: Any = AutoConfig.for_model(model_type)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    names = [f"model.language_model.layers.{layer}.norm.weight" for layer in range(100)]
    save_file({name: torch.ones(8) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{model_type} is not a causal language model"):
        plan(resolve(str(tmp_path), "main", Recorder()), None, Tokens(), ("f32",))
