"""Published mixtures of experts by their configuration alone, and what EXPERTS' model says that they take.

The sizes of the first, third and last are their published ones; the others are transformers' own defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN3 = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA4 = {
    "hidden_size": 2816,
    "num_hidden_layers": 30,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5,
}
# Family, sizes, GiB of all weights held in 4 bit (embeddings, head and routers in 16), thousands of millions of values.
PUBLISHED = {
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3, 15.55, 30.5),
    "Qwen3.6-35B-A3B": ("qwen3_5_moe_text", {}, 18.09, 34.7),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 11.66, 20.9),
    "GLM-4.7-Flash": ("glm4_moe_lite", {}, 15.27, 29.9),
    "Gemma 4 26B-A4B": ("gemma4_text", GEMMA4, 13.16, 25.2),
}

# By the names that recipes have for them.
BASES = {
    "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
    "Qwen/Qwen3.6-35B-A3B": "Qwen3.6-35B-A3B",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "zai-org/GLM-4.7-Flash": "GLM-4.7-Flash",
}


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    family, sizes, _, _ = PUBLISHED[name]
    return CONFIG_MAPPING[family](**sizes)


# GiB at 2,048 and 8,192 tokens by a sum that no simulation is in: resident weights, or embeddings, head and two layers;
# the experts of a layer forth and back in chunks of 256 MiB, checkpoints, attention's adapters, and 1.0 for context and
# pieces of the loss.
BY_HAND = {
    "Qwen3-30B-A3B": ((17.8, 19.8), (4.0, 6.0)),
    "Qwen3.6-35B-A3B": ((20.4, 22.1), (5.0, 6.8)),
    "gpt-oss-20b": ((14.3, 16.3), (5.4, 7.4)),
    "GLM-4.7-Flash": ((17.6, 19.1), (4.1, 5.7)),
    "Gemma 4 26B-A4B": ((15.5, 17.6), (4.5, 6.6)),
}


def folder_of(name: str, parent: Path) -> Path:
    """A folder with nothing but the mixture's `config.json`."""
    folder = parent / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config_of(name).to_dict(), "dtype": "bfloat16"}))
    return folder
