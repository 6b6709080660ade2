"""Shapes of published models, as their `config.json` tells them: facts only, no weights and no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
_QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
    }


def _model(family: dict[str, Any], tied: bool, *shape: int) -> dict[str, Any]:
    return {**family, **_shape(*shape), "tie_word_embeddings": tied, "dtype": "bfloat16"}


SHAPES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _model(_LLAMA, True, 576, 1536, 30, 9, 3, 49152),
    "meta-llama/Llama-3.2-1B-Instruct": _model(_LLAMA, True, 2048, 8192, 16, 32, 8, 128256),
    "meta-llama/Llama-3.1-8B-Instruct": _model(_LLAMA, False, 4096, 14336, 32, 32, 8, 128256),
    "meta-llama/Llama-3.1-70B-Instruct": _model(_LLAMA, False, 8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.3-70B-Instruct": _model(_LLAMA, False, 8192, 28672, 80, 64, 8, 128256),
    "mistralai/Mistral-7B-Instruct-v0.3": _model(_MISTRAL, False, 4096, 14336, 32, 32, 8, 32768),
    "Qwen/Qwen3-4B": _model(_QWEN3, True, 2560, 9728, 36, 32, 8, 151936),
    "Qwen/Qwen3-14B": _model(_QWEN3, False, 5120, 17408, 40, 40, 8, 151936),
    "Qwen/Qwen3-32B": _model(_QWEN3, False, 5120, 25600, 64, 64, 8, 151936),
}


def config_folder(name: str, parent: Path) -> Path:
    """A folder with nothing but the model's `config.json`."""
    folder = parent / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    return folder
