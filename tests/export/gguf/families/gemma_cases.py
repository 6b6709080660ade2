"""Tiny models of Gemma 1, 3n and 4, and what would be forgotten about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from types import MethodType
from typing import Any

import torch

from qlora.export.gguf.family import NOTHING, PLUS_ONE
from qlora.export.gguf.plan import GgufPlan
from tests.export.gguf import written
from tests.export.gguf.families.cases import VOCAB, Case, Fault, neutral_tensors, unchanged_weights, with_key, without

WINDOW = 16
BASE: Mapping[str, Fault] = {"rope base": with_key("rope.freq_base", 10.0)}
LOCAL: Mapping[str, Fault] = {
    "rope base of windows": with_key("rope.freq_base_swa", 10.0),
    "window": with_key("attention.sliding_window", 4096),
}
# A random model's branches are damped: rounding grows with each layer else, to a KL of 2e-4 after 25 of them.
DAMPED: Mapping[str, float] = {
    "post_attention_layernorm.weight": 0.3,
    "post_feedforward_layernorm.weight": 0.3,
    "post_per_layer_input_norm.weight": 0.3,
    "post_laurel_norm.weight": 0.3,
    "prediction_coefs.weight": 0.2,
    "correction_coefs.weight": 0.2,
}


def plus_one(planned: GgufPlan) -> GgufPlan:
    """Norms as older Gemmas have them."""
    tensors = tuple(
        replace(tensor, change=PLUS_ONE) if tensor.name.endswith("norm.weight") else tensor
        for tensor in planned.layout.tensors
    )
    return written.with_layout(planned, tensors=tensors)


def stacked_backwards(planned: GgufPlan) -> GgufPlan:
    """The projections that are one tensor of the file, in another order."""
    stacked = [tensor for tensor in planned.layout.tensors if tensor.name == "altup_proj.weight"]
    turned = {one.parameter: other.parameter for one, other in zip(stacked, reversed(stacked), strict=True)}
    tensors = tuple(
        replace(tensor, parameter=turned.get(tensor.parameter, tensor.parameter)) for tensor in planned.layout.tensors
    )
    return written.with_layout(planned, tensors=tensors)


def all_dims_turn(planned: GgufPlan) -> GgufPlan:
    """Full layers as if all of their dims turned."""
    ones = {name: values * 0 + 1 for name, values in planned.layout.constants.items()}
    return written.with_layout(planned, constants=ones)


def unscaled(planned: GgufPlan) -> GgufPlan:
    """Layers without the number that multiplies what leaves them."""
    blank = replace(NOTHING, to_gguf=lambda rows, unit: torch.ones_like(rows), name="blank scale")
    tensors = tuple(
        replace(tensor, change=blank) if "layer_output_scale" in tensor.name else tensor
        for tensor in planned.layout.tensors
    )
    assert tensors != planned.layout.tensors
    return written.with_layout(planned, tensors=tensors)


def as_llama_cpp_spreads(model: Any) -> None:
    """Gemma 3n's gate: llama.cpp takes the standard deviation with n - 1. Of 96 values that is 0.5 % more (a KL of
    3e-3), of 1,024 a twentieth of a percent (5e-6), of the 8,192 and 16,384 of the real models 0.006 % and less."""

    def top(self: Any, gate: torch.Tensor) -> torch.Tensor:
        share = NormalDist().inv_cdf(float(self.activation_sparsity))
        return torch.relu(gate - gate.mean(-1, keepdim=True) - share * gate.std(-1, keepdim=True, unbiased=True))

    for module in model.modules():
        if hasattr(module, "_gaussian_topk"):
            module._gaussian_topk = MethodType(top, module)


GEMMA_4: Mapping[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
FAULTS_4: Mapping[str, Fault] = {
    **BASE,
    **LOCAL,
    "dims that stand still": all_dims_turn,
    "norm + 1": plus_one,
    "qk-norm": neutral_tensors("attn_q_norm"),
    "scale of layers": unscaled,
    "head size of windows": with_key("attention.key_length_swa", 32),
    "window pattern": with_key("attention.sliding_window_pattern", [True, True, True, True, True, False]),
}

CASES = (
    Case(
        "gemma",
        {"head_dim": 32, "tie_word_embeddings": True},
        {**BASE, "norm + 1": unchanged_weights("plus one"), "head size": without("attention.key_length")},
    ),
    Case(
        "gemma3n_text",
        {
            "num_hidden_layers": 25,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 96,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 5,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 5,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": VOCAB - 4,  # the last tokens are images and sound
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 15,
        },
        {
            **BASE,
            **LOCAL,
            "norm + 1": plus_one,
            "qk-norm": neutral_tensors("attn_q_norm"),
            "embeddings by layer": neutral_tensors("per_layer_token_embd"),
            "order of the streams": stacked_backwards,
            "scale of the streams": neutral_tensors("altup_correct_scale"),
            "laurel": neutral_tensors("laurel_post_norm"),
        },
        damped=DAMPED,
        adjust=as_llama_cpp_spreads,
    ),
    Case(
        "gemma4_text",
        GEMMA_4,
        {
            **FAULTS_4,
            "softcap": with_key("final_logit_softcapping", 0.0),
            "embeddings by layer": neutral_tensors("per_layer_token_embd"),
            "shared keys": with_key("attention.shared_kv_layers", 0),
        },
        damped={**DAMPED, "layer_scalar": 1.2},
    ),
    Case(
        "gemma4_text",
        {
            **GEMMA_4,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": None,
        },
        {**FAULTS_4, "key heads of full layers": with_key("attention.head_count_kv", 2)}
        | {"no softcap": without("final_logit_softcapping")},
        note="keys as values",
        damped={**DAMPED, "layer_scalar": 1.2},
    ),
)
