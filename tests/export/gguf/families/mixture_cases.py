"""Tiny mixtures of experts, and what would be forgotten about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.export.gguf.experts import turned
from qlora.export.gguf.family import NOTHING, GgufTensor
from qlora.export.gguf.plan import GgufPlan
from tests.export.gguf import written
from tests.export.gguf.families.cases import Case, Fault, neutral_tensors, unchanged_weights, with_key, without

ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 5e4}
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
# gpt-oss' own, whose ramp is not rounded; of heads wide enough that it is on it.
OSS_YARN: Mapping[str, Any] = {**YARN, "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}


def changed(part: str, change: Callable[[GgufTensor], GgufTensor]) -> Fault:
    """Tensors whose names hold `part`, changed."""

    def fault(planned: GgufPlan) -> GgufPlan:
        tensors = tuple(change(one) if part in one.name else one for one in planned.layout.tensors)
        assert tensors != planned.layout.tensors
        return written.with_layout(planned, tensors=tensors)

    return fault


def exchanged(one: str, other: str) -> Fault:
    """Two tensors of each layer under each other's names."""

    def fault(planned: GgufPlan) -> GgufPlan:
        names = {f".{one}.": f".{other}.", f".{other}.": f".{one}."}

        def turn(tensor: GgufTensor) -> GgufTensor:
            for own, new in names.items():
                if own in tensor.name:
                    name = tensor.name.replace(own, new)
                    return replace(tensor, name=name, place=tensor.place and replace(tensor.place, name=name))
            return tensor

        tensors = sorted(map(turn, planned.layout.tensors), key=lambda tensor: (tensor.name, tensor.at))
        assert tuple(tensors) != planned.layout.tensors
        return written.with_layout(planned, tensors=tuple(tensors))

    return fault


def times(part: str, factor: float) -> Fault:
    """Weights multiplied, as if a scale of theirs were counted twice or not at all."""
    scaled = replace(NOTHING, to_gguf=lambda rows, unit: rows * factor, name="scaled")
    return changed(part, lambda tensor: replace(tensor, change=scaled))


def _first_expert_last(tensor: GgufTensor) -> GgufTensor:
    """Experts by the order of their names as text, say, and not of their numbers."""
    if tensor.place is None or tensor.rows == tensor.stored[0]:
        turn = replace(NOTHING, to_gguf=lambda rows, unit: tensor.change.to_gguf(rows, unit).flip(0), name="backwards")
        return replace(tensor, change=turn, unit=tensor.rows or 1)
    rows = tensor.stored[-2]
    at = (tensor.stored[0] - 1 - tensor.at // rows) * rows + tensor.at % rows
    return replace(tensor, place=replace(tensor.place, at=at))


def backwards(planned: GgufPlan) -> GgufPlan:
    """Experts of the second product in another order than those of the first."""
    found = changed("ffn_down_exps.weight", _first_expert_last)(planned)
    order = {name: number for number, name in enumerate(planned.layout.stored)}
    tensors = sorted(found.layout.tensors, key=lambda tensor: (order[tensor.name], tensor.at))
    return written.with_layout(planned, tensors=tuple(tensors))


def _blocked(tensor: GgufTensor) -> GgufTensor:
    """Gate above up, where they stand in turns."""
    up = tensor.name.split(".")[2].startswith("ffn_up")
    transposed = len(tensor.shape) == 3
    out = 2 * (tensor.shape[1])
    share = slice(out // 2, out) if up else slice(0, out // 2)
    return replace(tensor, change=turned(transposed, share, out))


def blocked(planned: GgufPlan) -> GgufPlan:
    for part in ("ffn_gate_exps", "ffn_up_exps"):
        planned = changed(part, _blocked)(planned)
    return planned


def halves_exchanged(tensor: GgufTensor) -> GgufTensor:
    turn = replace(NOTHING, to_gguf=lambda rows, unit: torch.cat(rows.chunk(2, 1)[::-1], 1), name="up above gate")
    return replace(tensor, change=turn)


class TableGelu(nn.Module):
    """GELU as ggml has it: a table of 16-bit values (ggml_vec_gelu_f32)."""

    def forward(self, values: Tensor) -> Tensor:
        table = nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))


def gelu_by_table(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = TableGelu()


ROUTED: Mapping[str, Fault] = {"router": times("ffn_gate_inp.weight", 2.0), "experts": backwards}
GATED: Mapping[str, Fault] = {**ROUTED, "gate and up": exchanged("ffn_gate_exps", "ffn_up_exps")}
SHARED: Mapping[str, Fault] = {
    "shared gate and up": exchanged("ffn_gate_shexp", "ffn_up_shexp"),
    "shared experts": times("ffn_down_shexp", 0.0),
}
WEIGHED: Mapping[str, Fault] = {"weight of the shared expert": times("ffn_gate_inp_shexp", -1.0)}
DEEP: Mapping[str, Fault] = {
    **GATED,
    **SHARED,
    "weights' scale": with_key("expert_weights_scale", 1.0),
    "norm of latents": neutral_tensors("attn_kv_a_norm"),
    "keys of heads": times("attn_k_b", -1.0),
    "values of heads": times("attn_v_b", -1.0),
}
BIASED: Mapping[str, Fault] = {
    "normalization": with_key("expert_weights_norm", False),
    "gating": with_key("expert_gating_func", 1),
    "bias of scores": neutral_tensors("exp_probs_b.bias"),
}
STATE: Mapping[str, Any] = {"head_dim": 32, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
LINEAR: Mapping[str, Fault] = {
    **GATED,
    **SHARED,
    **WEIGHED,
    "norm + 1": unchanged_weights("plus one"),
    "kernel": neutral_tensors("ssm_conv1d.weight"),
    "time step bias": neutral_tensors("ssm_dt.bias"),
}


def mixture(family: str, fields: Mapping[str, Any], faults: Mapping[str, Fault], note: str = "", **more: Any) -> Case:
    return Case(family, fields, faults, note, mixture=True, **more)


CASES = (
    mixture("qwen3_moe", {"norm_topk_prob": True, "rope_parameters": ROPE}, GATED),
    mixture("qwen2_moe", {"rope_parameters": ROPE}, {**GATED, **SHARED, **WEIGHED}),
    mixture("olmoe", {"num_key_value_heads": 4, "rope_parameters": ROPE}, GATED),
    mixture(
        "mixtral",
        {"sliding_window": None, "rope_parameters": ROPE},
        {**GATED, "permutation": unchanged_weights("interleave")},
    ),
    mixture(
        "granitemoe",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.6, "rope_parameters": ROPE},
        {**GATED, "permutation": unchanged_weights("interleave"), "logit scale": with_key("logit_scale", 1.0)},
    ),
    mixture("granitemoeshared", {"rope_parameters": ROPE}, {**GATED, **SHARED}),
    mixture(
        "gpt_oss",
        {"rope_parameters": ROPE, "head_dim": 32},
        {
            **ROUTED,
            "interleaving": blocked,
            "sinks": neutral_tensors("attn_sinks"),
            "biases of experts": neutral_tensors("exps.bias"),
            "bias of the router": neutral_tensors("ffn_gate_inp.bias"),
            "window": with_key("attention.sliding_window", 4096),
        },
    ),
    mixture(
        "gpt_oss",
        {"rope_parameters": {**OSS_YARN, "truncate": True}, "max_position_embeddings": 131072, "head_dim": 64},
        {"yarn": without("rope.scaling.type")},
        "yarn",
    ),
    mixture("deepseek_v2", {"routed_scaling_factor": 1.5, "rope_parameters": ROPE}, DEEP),
    mixture(
        "deepseek_v2",
        {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "max_position_embeddings": 1280},
        {"factor on attention": without("rope.scaling.yarn_log_multiplier")},
        "yarn",
    ),
    mixture("deepseek_v3", {"rope_parameters": ROPE}, {**DEEP, **BIASED}),
    mixture(
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
        | {"max_position_embeddings": 1280},
        {"groups": without("expert_group_count", "expert_group_used_count")}
        | {"factor on attention": without("rope.scaling.yarn_log_multiplier")},
        "groups and yarn",
    ),
    mixture("glm4_moe_lite", {"rope_parameters": ROPE}, {**DEEP, **BIASED}),
    mixture(
        "glm4_moe",
        {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5},
        {**GATED, **SHARED, **BIASED, "qk-norm": neutral_tensors("attn_q_norm")},
    ),
    mixture("qwen3_5_moe_text", STATE, {**LINEAR, "value heads": unchanged_weights("value heads")}),
    mixture(
        "qwen3_next",
        STATE,
        {**LINEAR, "gates": times("attn_gate", -1.0), "queries and keys": times("attn_qkv", -1.0)},
    ),
    mixture(
        "gemma4_text",
        {},
        {
            **ROUTED,
            "gate and up": changed("ffn_gate_up_exps", halves_exchanged),
            "router's scale": neutral_tensors("ffn_gate_inp.scale"),
            "experts' scales": neutral_tensors("ffn_down_exps.scale"),
            "second norm": neutral_tensors("pre_ffw_norm_2"),
        },
        adjust=gelu_by_table,
    ),
)
