"""Tiny models of the dense families, and what would be forgotten about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.export.gguf.cases import LINEAR, LLAMA3, LONGROPE
from tests.export.gguf.families.cases import (
    Case,
    Fault,
    neutral_tensors,
    unchanged_weights,
    with_key,
    without,
    without_factors,
)

WINDOW = 16
FOUR: Mapping[str, Any] = {"num_hidden_layers": 4}
ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 5e5}
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
BASE: Mapping[str, Fault] = {"rope base": with_key("rope.freq_base", 1000.0)}
PERMUTED: Mapping[str, Fault] = {"permutation": unchanged_weights("interleave")}
HALF = {**ROPE, "partial_rotary_factor": 0.5}
HALF_ROPE: Mapping[str, Fault] = {"rotated dims": with_key("rope.dimension_count", 16)}

GEMMA: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
CASES = (
    Case(
        "llama",
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
        {**BASE, **PERMUTED, "rope scaling": without_factors},
    ),
    Case("mistral", {"sliding_window": None, "head_dim": 32, "rope_parameters": ROPE}, {**BASE, **PERMUTED}),
    Case(
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": ROPE},
        {**BASE, "biases": neutral_tensors("attn_q.bias")},
    ),
    Case(
        "qwen3",
        {"head_dim": 32, "rope_parameters": YARN},
        {**BASE, "rope scaling": without("rope.scaling.type"), "qk-norm": neutral_tensors("attn_q_norm")},
    ),
    Case(
        "phi3",
        {
            "sliding_window": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 512},
        },
        {**BASE, "rope scaling": without_factors, "attention factor": without("rope.scaling.attn_factor")},
    ),
    Case(
        "gemma2",
        {
            **GEMMA,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
            "rope_parameters": ROPE,
        },
        {
            **BASE,
            "norm + 1": unchanged_weights("plus one"),
            "window": with_key("attention.sliding_window", 64),
            "attention softcap": with_key("attn_logit_softcapping", 50.0),
            "softcap": without("final_logit_softcapping"),
        },
    ),
    Case(
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e6}, "sliding_attention": ROPE},
        },
        {
            **BASE,
            "norm + 1": unchanged_weights("plus one"),
            "window": with_key("attention.sliding_window", 64),
            "pattern": without("attention.sliding_window_pattern"),
            "rope base of windows": without("rope.freq_base_swa"),
            "rope scaling": without("rope.scaling.type", "rope.scaling.factor"),
            "qk-norm": neutral_tensors("attn_q_norm"),
        },
    ),
    Case(
        "smollm3",
        {**FOUR, "tie_word_embeddings": True, "rope_parameters": ROPE, "head_dim": 16},
        {**BASE, **PERMUTED, "epsilon": with_key("attention.layer_norm_rms_epsilon", 0.3)},
    ),
    Case(
        "olmo2",
        {"tie_word_embeddings": False, "rope_parameters": ROPE},
        {**BASE, "qk-norm": neutral_tensors("attn_q_norm"), "norms": neutral_tensors("post_ffw_norm")},
    ),
    Case(
        "olmo3",
        {
            **FOUR,
            "tie_word_embeddings": False,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": YARN, "sliding_attention": ROPE},
        },
        {
            **BASE,
            "window": without("attention.sliding_window", "attention.sliding_window_pattern"),
            "pattern": without("attention.sliding_window_pattern"),
            "rope scaling": without("rope.scaling.type"),
            "qk-norm": neutral_tensors("attn_k_norm"),
        },
    ),
    Case(
        "granite",
        {
            "tie_word_embeddings": True,
            "rope_parameters": ROPE,
            "embedding_multiplier": 6.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 1.5,
        },
        {
            **BASE,
            **PERMUTED,
            "embedding scale": without("embedding_scale"),
            "residual scale": without("residual_scale"),
            "attention scale": without("attention.scale"),
            "logit scale": with_key("logit_scale", 1.0),
        },
    ),
    Case(
        "glm4",
        {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": HALF,
        },
        {
            **BASE,
            **HALF_ROPE,
            "biases": neutral_tensors("attn_q.bias"),
            "norms": neutral_tensors("post_attention_norm"),
        },
    ),
    Case(
        "cohere2",
        {**FOUR, "tie_word_embeddings": True, "sliding_window": WINDOW, "logit_scale": 0.25, "rope_parameters": ROPE},
        {
            **BASE,
            "window": with_key("attention.sliding_window", 64),
            "logit scale": with_key("logit_scale", 1.0),
            "pattern": with_key("attention.sliding_window_pattern", 2),
        },
    ),
    Case(
        "ministral3",
        {
            "tie_word_embeddings": False,
            "head_dim": 32,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
        {
            **BASE,
            **PERMUTED,
            "temperature": without("attention.temperature_scale"),
            "rope scaling": without("rope.scaling.type"),
            "attention factor": without("rope.scaling.attn_factor"),
            "trained length": with_key("rope.scaling.original_context_length", 512),
        },
    ),
    Case(
        "exaone4",
        {
            "tie_word_embeddings": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": LLAMA3,
        },
        {
            **BASE,
            "qk-norm": neutral_tensors("attn_q_norm"),
            "norms": neutral_tensors("post_ffw_norm"),
            "rope scaling": without_factors,
        },
    ),
    Case(
        "exaone4",
        {
            "num_hidden_layers": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "sliding_window": WINDOW,
            "rope_parameters": ROPE,
        },
        {**BASE, "window": with_key("attention.sliding_window", 64), "qk-norm": neutral_tensors("attn_k_norm")},
        note="with windows",
    ),
    Case(
        "starcoder2",
        {"tie_word_embeddings": True, "sliding_window": None, "rope_parameters": ROPE},
        {**BASE, "biases": neutral_tensors("ffn_up.bias"), "norm biases": neutral_tensors("attn_norm.bias")},
    ),
    Case(
        "phi",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "rope_parameters": HALF,
        },
        {
            **BASE,
            **HALF_ROPE,
            "biases": neutral_tensors("output.bias"),
            "norm biases": neutral_tensors("attn_norm.bias"),
        },
    ),
    Case(
        "nemotron",
        {"tie_word_embeddings": False, "head_dim": 16, "rope_parameters": HALF},
        {
            **BASE,
            **HALF_ROPE,
            "norm + 1": unchanged_weights("plus one"),
            "norm biases": neutral_tensors("attn_norm.bias"),
        },
    ),
    Case("exaone", {"rope_parameters": LLAMA3}, {**BASE, **PERMUTED, "rope scaling": without_factors}),
    Case("internlm3", {"rope_parameters": ROPE, "head_dim": 32}, {**BASE, **PERMUTED}),
    Case("iquestcoder", {"rope_parameters": ROPE, "head_dim": 16}, {**BASE, **PERMUTED}),
    Case(
        "arcee",
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
        {**BASE, **PERMUTED, "rope scaling": without_factors},
    ),
    Case(
        "seed_oss",
        {"tie_word_embeddings": False, "head_dim": 32, "attention_bias": True, "rope_parameters": ROPE},
        {**BASE, "biases": neutral_tensors("attn_q.bias"), "norms": neutral_tensors("post_attention_norm")},
    ),
    Case("ernie4_5", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": ROPE}, BASE),
    Case("helium", {"head_dim": 16, "rope_parameters": ROPE}, BASE),
    Case(
        "hunyuan_v1_dense",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
        },
        {"rope scaling": with_key("rope.freq_base", 1e4), "qk-norm": neutral_tensors("attn_q_norm")},
    ),
    Case(
        "ministral",
        {"head_dim": 16, "sliding_window": 128, "rope_parameters": ROPE},
        {**BASE, **PERMUTED},
    ),
    Case(
        "stablelm",
        {"tie_word_embeddings": False, "use_qkv_bias": True, "use_parallel_residual": False, "rope_parameters": HALF},
        {
            **BASE,
            **HALF_ROPE,
            "biases": neutral_tensors("attn_q.bias"),
            "norm biases": neutral_tensors("attn_norm.bias"),
        },
    ),
    Case(
        "stablelm",
        {"tie_word_embeddings": False, "use_parallel_residual": True, "rope_parameters": HALF},
        {**BASE, **HALF_ROPE},
        note="parallel",
    ),
    Case(
        "cohere",
        {"tie_word_embeddings": True, "logit_scale": 0.25, "rope_parameters": ROPE},
        {**BASE, "logit scale": with_key("logit_scale", 1.0)},
    ),
    Case(
        "olmo",
        {"tie_word_embeddings": False, "clip_qkv": 0.8, "rope_parameters": ROPE},
        {**BASE, **PERMUTED, "clamp": without("attention.clamp_kqv")},
    ),
    Case(
        "jais2",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_parameters": ROPE},
        {**BASE, "biases": neutral_tensors("ffn_up.bias"), "norm biases": neutral_tensors("attn_norm.bias")},
    ),
)
