"""A tiny random base of every family of causal models that transformers knows and people fine-tune.

`tests/families.py` has the few that most tests use; here is one shape for all, and what a family has of its own, so
that each kind of its layers is there: windows, hybrids, shared layers, inputs a layer. Mixtures of experts are a
configuration alone: they are refused by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.families import END_OF_TURN_ID, PAD_ID, WINDOW, make_model, make_tokenizer

VOCAB = 384
# Given to a family where its configuration has the key.
_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "initializer_range": 0.125,
    "pad_token_id": PAD_ID,
    "bos_token_id": END_OF_TURN_ID,
    "eos_token_id": END_OF_TURN_ID,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = {"query_pre_attn_scalar": 16, **_WINDOWED}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}

# Dense families, hybrids among them: what each has of its own.
DENSE: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_WINDOWED},
    "cwm": {**_WINDOWED},
    "diffllama": {},
    "doge": {"keep_window_size": 64},
    "ernie4_5": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": 2, **_WINDOWED},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "mamba_expand": 2},
    "falcon_mamba": {"time_step_rank": 8, "state_size": 8},
    "gemma": {},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA,
    "gemma3n_text": {
        **_PER_LAYER,
        **_WINDOWED,
        "intermediate_size": [128] * 4,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**_PER_LAYER, **_WINDOWED, "global_head_dim": 32},
    "gemma4_unified_text": {**_PER_LAYER, **_WINDOWED, "global_head_dim": 32},
    "glm": {},
    "glm4": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox_japanese": {"hidden_dropout": 0.0},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.25},
    "granite_swa": {"logits_scaling": 4.0, **_WINDOWED},
    "granitemoehybrid": {
        **_MAMBA2,
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "shared_intermediate_size": 128,
        "logits_scaling": 4.0,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 2.0},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {"num_key_value_heads": 4},
    "jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "llama": {},
    "mamba": {"time_step_rank": 8, "state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minicpm3": {**_LATENT, "num_key_value_heads": 4, "dim_model_base": 32},
    "ministral": {**_WINDOWED},
    "ministral3": {"sliding_window": None},
    "mistral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_WINDOWED},
    "olmo_hybrid": {
        **_LINEAR_ATTENTION,
        "linear_num_value_heads": 2,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": {**_LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"] * 2},
    "recurrent_gemma": {
        "attention_window_size": WINDOW,
        "lru_width": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_hidden_layers": 3,
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "seed_oss": {"residual_dropout": 0.0},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": _GEMMA,
    "xglm": {"ffn_dim": 128, "dropout": 0.0},
    "xlstm": {"num_heads": 4, "embedding_dim": 64, "num_blocks": 4, "chunk_size": 16},
    "youtu": {**_LATENT, "num_key_value_heads": 4, "head_dim": 8},
    "zamba": {
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_dt_rank": 8,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
    },
}
# Mixtures of experts: refused by their configuration, as their publishers have it.
MIXTURES = (
    *("afmoe", "aria_text", "axk1", "bailing_hybrid", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3"),
    *("deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("gpt_oss", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba_moe", "jetmoe", "kimi_linear"),
    *(
        "lfm2_moe",
        "llama4_text",
        "longcat_flash",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "mixtral",
        "nemotron_h_moe",
    ),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "sarvam_moe", "solar_open"),
)
# Of a type that can be both.
_OTHERWISE_DENSE = {"jamba_moe": "jamba", "nemotron_h_moe": "nemotron_h"}
FAMILIES = (*DENSE, *MIXTURES)


def make_config(family: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a family's tiny model, or of a mixture as transformers has it by default."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if family in MIXTURES:
        return AutoConfig.for_model(
            family.removesuffix("_moe") if family in ("jamba_moe", "nemotron_h_moe") else family
        )
    kind = CONFIG_MAPPING[family]
    default = kind()
    known = {*default.to_dict(), *default.attribute_map}
    shape = {key: value for key, value in _SHAPE.items() if key in known}
    if getattr(default, "sliding_window", None) is None:
        shape.pop("sliding_window", None)
    return kind(**{**shape, **DENSE[family], **(overrides or {})})


def make_base(family: str, folder: Path, *, seed: int = 0, overrides: Mapping[str, Any] | None = None) -> Path:
    """Writes a family's tiny random base in bf16, or a mixture's configuration, into `folder` and returns it."""
    import torch

    config = make_config(family, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    if family in MIXTURES:
        config.save_pretrained(folder)
    else:
        make_model(config, seed).to(torch.bfloat16).save_pretrained(folder)
        make_tokenizer(VOCAB).save_pretrained(folder)
    return folder
