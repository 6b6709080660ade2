"""Tiny models that carry a state from token to token, and what would be forgotten about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.export.gguf.families.cases import Case, Fault, neutral_tensors, unchanged_weights, with_key, without

BASE: Mapping[str, Fault] = {"rope base": with_key("rope.freq_base", 10.0)}
ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 5e4}
STATE: Mapping[str, Fault] = {
    "A as stored": unchanged_weights("A in a column"),
    "D": neutral_tensors("ssm_d"),
    "time step bias": neutral_tensors("ssm_dt.bias"),
    "kernel": neutral_tensors("ssm_conv1d.weight"),
    "kernel's bias": neutral_tensors("ssm_conv1d.bias"),
}
MAMBA: Mapping[str, Any] = {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}

GRANITE = {
    **MAMBA,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.6,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
}
SCALES: Mapping[str, Fault] = {
    "embedding scale": without("embedding_scale"),
    "residual scale": without("residual_scale"),
    "attention scale": without("attention.scale"),
    "logit scale": with_key("logit_scale", 1.0),
}
FALCON = {
    **MAMBA,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "head_dim": 16,
    "mlp_multipliers": [0.6, 1.6],
    "ssm_multipliers": [0.7, 1.4, 0.6, 1.5, 0.5],
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 4.0,
    "key_multiplier": 0.4,
    "attention_out_multiplier": 0.6,
    "attention_in_multiplier": 1.4,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.6,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
}
MULTIPLIERS = (
    *("input multipliers", "ssm_out_multiplier", "attention_in_multiplier", "key_multiplier"),
    *("attention_out_multiplier", "mlp_multipliers[0]", "mlp_multipliers[1]", "embedding_multiplier"),
    "lm_head_multiplier",
)
QWEN = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "tie_word_embeddings": False,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
DELTA: Mapping[str, Fault] = {
    **BASE,
    "norm + 1": unchanged_weights("plus one"),
    "time step bias": neutral_tensors("ssm_dt.bias"),
    "kernel": neutral_tensors("ssm_conv1d.weight"),
    "norm of the state": neutral_tensors("ssm_norm"),
    "qk-norm": neutral_tensors("attn_q_norm"),
    "rotated dims": with_key("rope.dimension_count", 32),
    "sections": with_key("rope.dimension_sections", [8, 0, 0, 0]),
}

CASES = (
    Case(
        "granitemoehybrid",
        GRANITE,
        {
            **STATE,
            **SCALES,
            "norm of the state": neutral_tensors("ssm_norm"),
            "positions": with_key("rope.scaling.finetuned", True),
        },
    ),
    Case(
        "granitemoehybrid",
        {
            **GRANITE,
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
            "rope_parameters": ROPE,
            "tie_word_embeddings": False,
        },
        {
            **BASE,
            **SCALES,
            "permutation": unchanged_weights("interleave"),
            "positions": with_key("rope.scaling.finetuned", False),
        },
        note="attention alone",
    ),
    Case("falcon_h1", FALCON, {**BASE, **STATE, **{name: unchanged_weights(name) for name in MULTIPLIERS}}),
    Case(
        "falcon_h1",
        {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
        {"norm of the state": neutral_tensors("ssm_norm")},
        note="normed state",
    ),
    Case(
        "qwen3_5_text",
        QWEN,
        {
            **DELTA,
            "A as stored": unchanged_weights("A, value heads"),
            "value heads": unchanged_weights("value heads"),
            "value heads of the kernel": unchanged_weights("kernel, value heads"),
            "value heads of the output": unchanged_weights("columns by value heads"),
        },
    ),
    Case(
        "qwen3_5_text",
        {**QWEN, "linear_num_value_heads": 2, "tie_word_embeddings": True, "num_hidden_layers": 3}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        {"A as stored": unchanged_weights("A"), "interval": with_key("full_attention_interval", 2)},
        note="as many keys as values",
    ),
    Case(
        "lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 32,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE,
        },
        {
            **BASE,
            "kernel": neutral_tensors("shortconv.conv"),
            "taps": with_key("shortconv.l_cache", 2),
            "qk-norm": neutral_tensors("attn_q_norm"),
            "kinds of layers": with_key("attention.head_count_kv", 2),
        },
    ),
)
