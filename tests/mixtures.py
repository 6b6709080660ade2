"""Tiny random mixtures of experts, one of each family that transformers' interface of experts runs, as `families` has
dense ones: what a family has of its own is there (shared experts, dense first layers, biases, linear attention).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.families import END_OF_TURN_ID, PAD_ID, make_model, make_tokenizer, split_into_shards
from tests.sampling import sampled

VOCAB = 384
_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "pad_token_id": PAD_ID,
    "bos_token_id": END_OF_TURN_ID,
    "eos_token_id": END_OF_TURN_ID,
    # Counts of experts, by the names that families give them.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"), 2),
    "tie_word_embeddings": False,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}

# What each family has of its own.
MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 96},
    "phimoe": {"num_local_experts": 4},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_dt_rank": 8,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [96, 96]},
    "olmoe": {},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 4.0},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 48},
    "granitemoehybrid": {
        **_MAMBA2,
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    },
    "deepseek_v2": {**_LATENT, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {**_LATENT, **_GROUPS, "first_k_dense_replace": 1},
    "glm4_moe": {**_GROUPS, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_LATENT, **_GROUPS, "mlp_layer_types": ["dense", "sparse"]},
    "qwen3_5_moe_text": {**_LINEAR_ATTENTION, "shared_expert_intermediate_size": 48},
    "qwen3_next": {
        **_LINEAR_ATTENTION,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 12,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
    },
    "ernie4_5_moe": {
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
        "moe_num_shared_experts": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 4,
    },
    "minimax_m2": {"num_local_experts": 8, "rotary_dim": 8},
}
# Of the default run; the others are slow ones.
FEW = ("qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "glm4_moe_lite")
FAMILIES = sampled(sorted(MIXTURES, key=lambda family: family not in FEW), *FEW)
# Experts narrower than the model is wide (2 I < H), whose rows are no multiple of 64: what hides no exchanged sides.
NARROW = 24


def make_config(family: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a family's tiny mixture; `overrides` win."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    names: set[str] = set()
    for one in kind.__mro__:
        names |= set(getattr(one, "__annotations__", ()))
    names |= set(getattr(kind, "attribute_map", {}))
    shape = {key: value for key, value in _SHAPE.items() if key in names}
    return kind(**{**shape, **MIXTURES[family], **(overrides or {})})


def narrow(family: str) -> dict[str, Any]:
    """What makes a family's experts narrow."""
    key = "moe_intermediate_size" if "moe_intermediate_size" in make_config(family).to_dict() else "intermediate_size"
    return {key: [NARROW] * 2 if family == "hunyuan_v1_moe" else NARROW}


def make_base(
    family: str, folder: Path, *, seed: int = 0, shards: int = 1, overrides: Mapping[str, Any] | None = None
) -> Path:
    """Writes a tiny random mixture of `family` into `folder`, in bf16 and as transformers saves it, and returns it."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    make_model(make_config(family, overrides), seed).to(torch.bfloat16).save_pretrained(folder)
    if shards > 1:
        split_into_shards(folder, shards)
    make_tokenizer(VOCAB).save_pretrained(folder)
    return folder


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Of each tensor of a checkpoint."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype} {hashlib.sha256(values).hexdigest()}"
    return found
