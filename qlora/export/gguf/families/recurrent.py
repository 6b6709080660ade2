"""Blocks that carry a state from token to token: Mamba 2 (Granite 4, Falcon-H1), gated delta nets (Qwen 3.5), short
convolutions (LFM2), most of them between layers of attention.

What llama.cpp's graphs want of the weights, and do not say when it is missing: A itself where transformers stores
log(-A); kernels of convolutions as matrices (channels, taps); A and D as columns; Falcon-H1's multipliers in the
weights that they multiply; and the value heads of Qwen 3.5 laid out so that those of one key head are not neighbours
(its operations repeat keys as 0 1 2 0 1 2, transformers as 0 0 1 1 2 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora.export.gguf import rope
from qlora.export.gguf.family import INTERLEAVE, NOTHING, PLUS_ONE, Change, Changes, Facts, Family, Place
from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused


def _column(rows: Tensor, unit: int) -> Tensor:
    return rows[:, None]


def _flat(rows: Tensor, unit: int) -> Tensor:
    return rows.reshape(-1)


COLUMN = Change("column", _column, _flat, whole=True, shape=lambda shape: (*shape, 1), linear=False)
A_COLUMN = Change(
    "A in a column",
    lambda rows, unit: -torch.exp(rows)[:, None],
    lambda rows, unit: torch.log(-rows[:, 0]),
    whole=True,
    shape=lambda shape: (*shape, 1),
    linear=False,
)
# A depthwise kernel (channels, 1, taps), and its bias (channels,).
KERNEL = Change(
    "kernel",
    lambda rows, unit: rows.squeeze(1) if rows.ndim == 3 else rows,
    lambda rows, unit: rows[:, None] if rows.ndim == 2 else rows,
    shape=lambda shape: (shape[0], shape[2]) if len(shape) == 3 else shape,
    linear=False,
)


def _times(name: str, factor: float | Tensor) -> Change:
    """Rows times a number, or times one each."""
    if isinstance(factor, Tensor):
        rows_1 = factor[:, None]
        return Change(name, lambda rows, unit: rows * rows_1, lambda rows, unit: rows / rows_1, whole=True)
    number = float(factor)
    return Change(name, lambda rows, unit: rows * number, lambda rows, unit: rows / number)


def _in_groups(groups: int) -> Change:
    """A norm over each of `groups` parts, a row a part."""
    return Change(
        "groups",
        lambda rows, unit: rows.reshape(groups, -1),
        _flat,
        whole=True,
        shape=lambda shape: (groups, shape[0] // groups),
        linear=False,
    )


# --- Mamba 2 ----------------------------------------------------------------------------------------------------------

_MAMBA: Mapping[str, Change] = {"mamba.A_log": A_COLUMN, "mamba.D": COLUMN, "mamba.conv1d": KERNEL}
_MAMBA_READS = frozenset(
    ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand")
)
# Its graph adds no bias to these projections; how long a chunk is changes no result; it does not clip time steps.
_MAMBA_FIXED: Mapping[str, tuple[Any, ...]] = {
    "mamba_conv_bias": (True, False),
    "mamba_proj_bias": (False,),
    "time_step_limit": ((0.0, float("inf")), [0.0, float("inf")], None),
}


def _mamba_keys(facts: Facts, inner: int) -> list[Key]:
    config = facts.config
    return [
        ("ssm.conv_kernel", config.mamba_d_conv),
        ("ssm.inner_size", inner),
        ("ssm.state_size", config.mamba_d_state),
        ("ssm.time_step_rank", config.mamba_n_heads),
        ("ssm.group_count", config.mamba_n_groups),
    ]


# --- Granite 4 --------------------------------------------------------------------------------------------------------


def _granite_inner(facts: Facts) -> int:
    return int(facts.config.mamba_expand * facts.config.hidden_size)


def _attends(facts: Facts) -> list[bool]:
    """Which layers are attention."""
    return [kind in ("attention", "full_attention") for kind in facts.config.layer_types]


def _kv_heads(facts: Facts) -> list[int]:
    """0 tells llama.cpp that a layer carries a state."""
    return [facts.config.num_key_value_heads if attends else 0 for attends in _attends(facts)]


def _granite_turns(facts: Facts) -> bool:
    return bool(facts.config.position_embedding_type == "rope")


def _granite_changes(facts: Facts) -> Changes:
    groups = _in_groups(facts.config.mamba_n_groups)
    return {**_MAMBA, "mamba.norm": groups, "q_proj": INTERLEAVE, "k_proj": INTERLEAVE}


def _granite_places(parameter: str, facts: Facts) -> Sequence[Place]:
    """Gate and up are two tensors of the file, one of the model."""
    owner, _, end = parameter.partition(".shared_mlp.")
    block, width = f"blk.{owner.rpartition('.')[2]}", facts.config.shared_intermediate_size
    if end == "input_linear.weight":
        return (
            Place(f"{block}.ffn_gate.weight", 0, width),
            Place(f"{block}.ffn_up.weight", width, 2 * width),
        )
    return (Place(f"{block}.ffn_down.weight"),) if end == "output_linear.weight" else ()


def _granite_rope(facts: Facts, model: Mapping[str, ReferenceRope]) -> Rope:
    if not _granite_turns(facts):
        return Rope((("rope.scaling.finetuned", False),), {})
    turned = rope.describe(facts.config, facts.rotated, model, ())
    return Rope((*turned.keys, ("rope.scaling.finetuned", True)), turned.tensors)


def _granite_keys(facts: Facts) -> Sequence[Key]:
    return [
        *_granite_alone_keys(facts),
        ("attention.head_count_kv", _kv_heads(facts)),
        *_mamba_keys(facts, _granite_inner(facts)),
    ]


def _granite_alone_keys(facts: Facts) -> Sequence[Key]:
    config = facts.config
    return [
        ("vocab_size", facts.shapes["model.embed_tokens.weight"][0]),
        ("feed_forward_length", config.shared_intermediate_size),
        ("attention.scale", float(config.attention_multiplier)),
        ("embedding_scale", float(config.embedding_multiplier)),
        ("residual_scale", float(config.residual_multiplier)),
        ("logit_scale", float(config.logits_scaling)),
    ]


def _granite_alone(facts: Facts) -> Family | None:
    """The smallest Granite 4 have attention in all layers, and llama.cpp runs them as it runs Granite 3."""
    if not all(_attends(facts)):
        return None
    return replace(_GRANITE_4, arch=gguf.MODEL_ARCH.GRANITE, keys=_granite_alone_keys)


# --- Falcon-H1 --------------------------------------------------------------------------------------------------------


def _falcon_inner(facts: Facts) -> int:
    config = facts.config
    return int(config.mamba_expand * config.hidden_size if config.mamba_d_ssm is None else config.mamba_d_ssm)


def _falcon_parts(facts: Facts) -> Tensor:
    """The factor of each row of a mixer's input projection: gate, x, B, C and time steps have one each."""
    config, inner = facts.config, _falcon_inner(facts)
    state = config.mamba_n_groups * config.mamba_d_state
    sizes = torch.tensor((inner, inner, state, state, config.mamba_n_heads))
    factors = torch.tensor(config.ssm_multipliers, dtype=torch.float32) * config.ssm_in_multiplier
    each: Tensor = factors.repeat_interleave(sizes)
    return each


def _falcon_changes(facts: Facts) -> Changes:
    config = facts.config
    gate, down = config.mlp_multipliers
    into = config.attention_in_multiplier
    return {
        **_MAMBA,
        "mamba.norm": _in_groups(config.mamba_n_groups),
        "mamba.in_proj": _times("input multipliers", _falcon_parts(facts)),
        "mamba.out_proj": _times("ssm_out_multiplier", config.ssm_out_multiplier),
        "q_proj": _times("attention_in_multiplier", into),
        "k_proj": _times("key_multiplier", into * config.key_multiplier),
        "v_proj": _times("attention_in_multiplier", into),
        "o_proj": _times("attention_out_multiplier", config.attention_out_multiplier),
        "gate_proj": _times("mlp_multipliers[0]", gate),
        "down_proj": _times("mlp_multipliers[1]", down),
        "embed_tokens": _times("embedding_multiplier", config.embedding_multiplier),
        "lm_head": _times("lm_head_multiplier", config.lm_head_multiplier),
    }


def _falcon_keys(facts: Facts) -> Sequence[Key]:
    return [
        ("vocab_size", facts.shapes["model.embed_tokens.weight"][0]),
        *_mamba_keys(facts, _falcon_inner(facts)),
    ]


def _check_falcon(facts: Facts) -> None:
    config = facts.config
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise refused("mamba_norm_before_gate = True of falcon_h1 (its graph gates, then norms)")
    if facts.tied and config.embedding_multiplier != config.lm_head_multiplier:
        raise refused("a falcon_h1 model whose head is its embedding, with another multiplier")


# --- Qwen 3.5 ---------------------------------------------------------------------------------------------------------


def _tiled(facts: Facts, width: int) -> Tensor:
    """Which row, of value heads of `width` rows, stands at each row of the file."""
    config = facts.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return torch.arange(values * width).reshape(keys, values // keys, width).transpose(0, 1).reshape(-1)


def _ordered(name: str, order: Tensor, inner: Change = NOTHING) -> Change:
    """`inner`, then the rows in another order."""
    back = torch.argsort(order)
    return Change(
        name,
        lambda rows, unit: inner.to_gguf(rows, unit)[order],
        lambda rows, unit: inner.inverse(rows[back], unit),
        whole=True,
        shape=inner.shape,
        linear=inner.linear,
    )


_A = Change("A", lambda rows, unit: -torch.exp(rows), lambda rows, unit: torch.log(-rows), whole=True, linear=False)


STATE_CHANGES: Changes = {"linear_attn.A_log": _A, "linear_attn.conv1d": KERNEL}


def _qwen_changes(facts: Facts) -> Changes:
    config = facts.config
    plain = {"linear_attn.norm": NOTHING, "norm": PLUS_ONE}
    if config.linear_num_key_heads == config.linear_num_value_heads:
        return {**plain, **STATE_CHANGES}
    values, heads = _tiled(facts, config.linear_value_head_dim), _tiled(facts, 1)
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    mixed = torch.cat([torch.arange(before), before + values])
    return {
        **plain,
        "linear_attn.A_log": _ordered("A, value heads", heads, _A),
        "linear_attn.dt_bias": _ordered("value heads", heads),
        "linear_attn.in_proj_a": _ordered("value heads", heads),
        "linear_attn.in_proj_b": _ordered("value heads", heads),
        "linear_attn.in_proj_z": _ordered("value heads", values),
        "linear_attn.in_proj_qkv": _ordered("value heads", mixed),
        "linear_attn.conv1d": _ordered("kernel, value heads", mixed, KERNEL),
        "linear_attn.out_proj": Change("columns by value heads", NOTHING.to_gguf, NOTHING.inverse, columns=values),
    }


# Rotated pairs for time, height and width (Qwen3_5TextRotaryEmbedding's default); of text all three are the same.
_SECTIONS = (11, 11, 10)


def _sections(facts: Facts) -> list[int]:
    return [*(facts.config.rope_parameters.get("mrope_section") or _SECTIONS), 0]


def _interval(facts: Facts) -> int | None:
    """Every how many layers the last one attends; None where they don't stand so."""
    attends = _attends(facts)
    every = attends.index(True) + 1 if any(attends) else 0
    return every if every and attends == [(layer + 1) % every == 0 for layer in range(facts.layers)] else None


def _qwen_keys(facts: Facts) -> Sequence[Key]:
    config = facts.config
    return [
        ("rope.dimension_sections", _sections(facts)),
        ("full_attention_interval", _interval(facts)),
        ("ssm.conv_kernel", config.linear_conv_kernel_dim),
        ("ssm.state_size", config.linear_key_head_dim),
        ("ssm.group_count", config.linear_num_key_heads),
        ("ssm.time_step_rank", config.linear_num_value_heads),
        ("ssm.inner_size", config.linear_num_value_heads * config.linear_value_head_dim),
    ]


def check_linear_heads(facts: Facts) -> None:
    config = facts.config
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise refused(f"value heads of {config.linear_value_head_dim} and keys of {config.linear_key_head_dim} dims")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise refused(f"{config.linear_num_value_heads} value heads for {config.linear_num_key_heads} key heads")
    if _interval(facts) is None:
        name = config.model_type.removesuffix("_text")
        raise refused(f"these layer_types of {name} (every Nth layer attends, the others carry a state)")


def _check_qwen(facts: Facts) -> None:
    check_linear_heads(facts)
    sections = _sections(facts)
    if sum(sections) > facts.head_dim:
        raise refused(f"mrope_section = {sections[:3]} for heads of {facts.head_dim} dims")
    # ggml, GGML_ROPE_TYPE_IMROPE: pair p is of the third p % 3; beyond its section it would not turn at all.
    pairs = [pair % sum(sections) for pair in range(facts.rotated // 2)]
    if len(sections) != 4 or any(pair >= 3 * sections[pair % 3] for pair in pairs):
        raise refused(f"mrope_section = {sections[:3]} for {len(pairs)} rotated pairs")


# --- LFM2 -------------------------------------------------------------------------------------------------------------


def _lfm_keys(facts: Facts) -> Sequence[Key]:
    wide = next(shape[0] for name, shape in facts.shapes.items() if name.endswith("feed_forward.w1.weight"))
    return [
        ("vocab_size", facts.shapes["model.embed_tokens.weight"][0]),
        ("feed_forward_length", wide),
        ("attention.head_count_kv", _kv_heads(facts)),
        ("shortconv.l_cache", facts.config.conv_L_cache),
    ]


def _lfm_changes(facts: Facts) -> Changes:
    return {"conv.conv": KERNEL}


_GRANITE_4 = Family(
    gguf.MODEL_ARCH.GRANITE_HYBRID,
    "silu",
    changes=_granite_changes,
    biases=("conv1d",),
    renamed={"mamba.dt_bias": "mamba.dt_proj.bias"},
    places=_granite_places,
    rope=_granite_rope,
    instead=_granite_alone,
    keys=_granite_keys,
    reads=_MAMBA_READS
    | {"shared_intermediate_size", "position_embedding_type", "attention_multiplier", "embedding_multiplier"}
    | {"residual_multiplier", "logits_scaling", "mamba_chunk_size"}
    | {"output_router_logits", "router_aux_loss_coef", "num_experts_per_tok"},
    fixed={**_MAMBA_FIXED, "num_local_experts": (0, None)},
)

FAMILIES: Mapping[str, Family] = {
    "granitemoehybrid": _GRANITE_4,
    "falcon_h1": Family(
        gguf.MODEL_ARCH.FALCON_H1,
        "silu",
        changes=_falcon_changes,
        biases=("conv1d",),
        renamed={"mamba.dt_bias": "mamba.dt_proj.bias"},
        keys=_falcon_keys,
        check=_check_falcon,
        reads=_MAMBA_READS
        | {"mamba_d_ssm", "mamba_rms_norm", "mamba_norm_before_gate", "mamba_chunk_size", "num_logits_to_keep"}
        | {"lm_head_multiplier", "embedding_multiplier", "mlp_multipliers", "key_multiplier", "ssm_multipliers"}
        | {"attention_out_multiplier", "attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"},
        fixed={**_MAMBA_FIXED, "projectors_bias": (False,)},
    ),
    "qwen3_5_text": Family(
        gguf.MODEL_ARCH.QWEN35,
        "silu",
        changes=_qwen_changes,
        partial_rope=True,
        renamed={"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
        keys=_qwen_keys,
        check=_check_qwen,
        reads=frozenset(("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"))
        | {"linear_num_key_heads", "linear_num_value_heads"},
    ),
    "lfm2": Family(
        gguf.MODEL_ARCH.LFM2,
        "silu",
        changes=_lfm_changes,
        epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
        keys=_lfm_keys,
        reads=frozenset(("conv_L_cache", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"))
        | {"full_attn_idxs"},
        fixed={"conv_bias": (False,)},
    ),
}
