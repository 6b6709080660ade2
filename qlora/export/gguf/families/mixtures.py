"""Mixtures of experts: what llama.cpp's graph of each takes for granted about its router, its shared experts and heads.

Whether the weights of the chosen experts are made to add up to 1 is written into most graphs, and the key that says it
is not read: a model that does it otherwise loads and is 2 to 3 nats off, without a word. Those are refused by the key.
How experts themselves are stored is `gguf/experts.py`; attention on latents (DeepSeek) is `latent.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora.export.gguf import rope
from qlora.export.gguf.experts import block_of, expert_keys, turned
from qlora.export.gguf.families import llama_like, recurrent
from qlora.export.gguf.family import (
    NOTHING,
    PLUS_ONE,
    QKV,
    Change,
    Changes,
    Facts,
    Family,
    Place,
    Shape,
    Windows,
    vocabulary,
    whole_width,
)
from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused

# Of training alone (noise and losses of routers), or of what a router's output is returned for.
TRAINING = frozenset(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))
SIGMOID, SOFTMAX = 2, 1  # llama.cpp, llama_expert_gating_func_type
# One row, that llama.cpp has as a vector: what weighs the shared expert.
ONE_ROW = Change(
    "one row", lambda rows, unit: rows[0], lambda rows, unit: rows[None], whole=True, shape=lambda s: s[1:]
)


def sparse_everywhere(facts: Facts) -> None:
    """For graphs that ask for a router in every layer."""
    found = {block_of(tensor.projection) for tensor in facts.experts.values()}
    if len(found) != facts.layers:
        dense = facts.layers - len(found)
        raise refused(f"{dense} of {facts.layers} layers without experts in {facts.config.model_type}")


# --- Qwen -------------------------------------------------------------------------------------------------------------

_QWEN_READS = TRAINING | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
_SPARSE: Mapping[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [], ())}


def _shared_keys(facts: Facts) -> list[Key]:
    shared = int(facts.config.shared_expert_intermediate_size)
    return [*expert_keys(facts), ("expert_shared_feed_forward_length", shared)]


def _one_row(facts: Facts) -> Changes:
    return {"shared_expert_gate": ONE_ROW}


def _check_qwen2(facts: Facts) -> None:
    sparse_everywhere(facts)
    whole_width(facts)


_QWEN35 = recurrent.FAMILIES["qwen3_5_text"]


def _qwen35_keys(facts: Facts) -> Sequence[Key]:
    return [*_QWEN35.keys(facts), *_shared_keys(facts)]


def _next_changes(facts: Facts) -> Changes:
    """Value heads stay where they are: its graph repeats keys as transformers does, unlike that of Qwen 3.5."""
    return {**_one_row(facts), "linear_attn.norm": NOTHING, "norm": PLUS_ONE, **recurrent.STATE_CHANGES}


def _next_places(parameter: str, facts: Facts) -> Sequence[Place]:
    """Queries, keys, values and gates stand together by key head; llama.cpp wants all queries, then all keys and so on,
    and the gates in a tensor of their own."""
    if not parameter.endswith(".linear_attn.in_proj_qkvz.weight"):
        return ()
    config, rows = facts.config, facts.shapes[parameter][0]
    heads, block = config.linear_num_key_heads, block_of(parameter)
    width = config.linear_num_value_heads // heads * config.linear_value_head_dim
    by_head = torch.arange(rows).reshape(heads, -1)
    parts = torch.split(by_head, [config.linear_key_head_dim] * 2 + [width] * 2, dim=1)
    mixed = torch.cat([part.reshape(-1) for part in parts[:3]])
    return (
        Place(f"{block}.attn_qkv.weight", change=_chosen("queries, keys, values", mixed, rows), unit=rows),
        Place(f"{block}.attn_gate.weight", change=_chosen("gates", parts[3].reshape(-1), rows), unit=rows),
    )


def _chosen(name: str, order: Tensor, of: int) -> Change:
    """Those rows, of so many."""

    def inverse(rows: Tensor, unit: int) -> Tensor:
        whole = torch.zeros(of, *rows.shape[1:], dtype=rows.dtype)
        whole[order] = rows
        return whole

    def shape(own: Shape) -> Shape:
        return (len(order), *own[1:])

    return Change(name, lambda rows, unit: rows[order], inverse, whole=True, shape=shape)


def _next_keys(facts: Facts) -> Sequence[Key]:
    keys = dict([*_QWEN35.keys(facts), *_shared_keys(facts)])
    return list({**keys, "rope.dimension_sections": None}.items())


def _check_next(facts: Facts) -> None:
    sparse_everywhere(facts)
    recurrent.check_linear_heads(facts)


# --- OLMoE ------------------------------------------------------------------------------------------------------------


def _check_olmoe(facts: Facts) -> None:
    """Its graph takes the norm of the keys to be as wide as that of the queries, and does not load otherwise."""
    sparse_everywhere(facts)
    whole_width(facts)
    config = facts.config
    if config.num_key_value_heads != config.num_attention_heads:
        raise refused(f"{config.num_key_value_heads} key heads for {config.num_attention_heads} heads in olmoe")


# --- Mixtral ----------------------------------------------------------------------------------------------------------


def _mixtral_keys(facts: Facts) -> Sequence[Key]:
    return [*vocabulary(facts), *expert_keys(facts)]


# --- Granite ----------------------------------------------------------------------------------------------------------

_GRANITE = llama_like.FAMILIES["granite"]


def _granite_keys(facts: Facts) -> Sequence[Key]:
    shared = facts.value("shared_intermediate_size")
    keys = [*_GRANITE.keys(facts), *expert_keys(facts)]
    return [*keys, ("expert_shared_feed_forward_length", int(shared))] if shared else keys


def _granite_places(parameter: str, facts: Facts) -> Sequence[Place]:
    """Gate and up of the shared experts are two tensors of the file, one of the model."""
    owner, _, end = parameter.partition(".shared_mlp.")
    if not end:
        return ()
    block, width = block_of(owner), facts.config.shared_intermediate_size
    if end == "output_linear.weight":
        return (Place(f"{block}.ffn_down_shexp.weight"),)
    return (
        Place(f"{block}.ffn_gate_shexp.weight", 0, width),
        Place(f"{block}.ffn_up_shexp.weight", width, 2 * width),
    )


# --- gpt-oss ----------------------------------------------------------------------------------------------------------


def _oss_places(parameter: str, facts: Facts) -> Sequence[Place]:
    """The biases of the experts (E, out), gate and up in turns as the experts' own rows are."""
    if parameter.endswith(".experts.gate_up_proj_bias"):
        out = facts.shapes[parameter][1]
        shares = (("gate", slice(0, out, 2)), ("up", slice(1, out, 2)))
        block = block_of(parameter)
        return [Place(f"{block}.ffn_{name}_exps.bias", change=turned(False, share, out)) for name, share in shares]
    return (Place(f"{block_of(parameter)}.ffn_down_exps.bias"),) if parameter.endswith(".down_proj_bias") else ()


def _oss_rope(facts: Facts, model: Mapping[str, ReferenceRope]) -> Rope:
    """llama.cpp rounds where the ramp of yarn positions begins and ends to whole dims (ggml_rope_yarn_corr_dims); the
    published models do not (`truncate` = false). Every file of theirs differs by that, and so does ours: it is told."""
    if not _unrounded(facts):
        return rope.describe(facts.config, facts.rotated, model, ())
    return rope.rounded_yarn(facts.config, facts.rotated, model)


def _unrounded(facts: Facts) -> bool:
    said = facts.config.rope_parameters
    return bool(said.get("rope_type") == "yarn" and said.get("truncate") is False)


def _oss_notices(facts: Facts) -> Sequence[str]:
    if not _unrounded(facts):
        return ()
    return (
        "llama.cpp rounds the ramp of gpt_oss' yarn positions, which the model does not: as every file of this family, "
        "it differs a little from the model",
    )


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        gguf.MODEL_ARCH.QWEN3MOE,
        "silu",
        keys=expert_keys,
        check=sparse_everywhere,
        reads=_QWEN_READS,
        fixed={"norm_topk_prob": (True,), **_SPARSE},
    ),
    "qwen2_moe": Family(
        gguf.MODEL_ARCH.QWEN2MOE,
        "silu",
        changes=_one_row,
        biases=QKV,
        keys=_shared_keys,
        check=_check_qwen2,
        reads=_QWEN_READS | {"shared_expert_intermediate_size", "qkv_bias"},
        fixed={"norm_topk_prob": (False,), **_SPARSE},
    ),
    "olmoe": Family(
        gguf.MODEL_ARCH.OLMOE,
        "silu",
        head="own",
        keys=expert_keys,
        check=_check_olmoe,
        reads=TRAINING | {"num_experts", "num_experts_per_tok"},
        fixed={"norm_topk_prob": (False,), "clip_qkv": (None,)},
    ),
    "mixtral": replace(
        llama_like.FAMILIES["llama"],
        biases=(),
        keys=_mixtral_keys,
        check=sparse_everywhere,
        reads=TRAINING | {"num_local_experts", "num_experts_per_tok"},
    ),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        replace(
            _GRANITE,
            arch=gguf.MODEL_ARCH.GRANITE_MOE,
            renamed={"block_sparse_moe.router": "block_sparse_moe.router.layer"},
            places=_granite_places,
            keys=_granite_keys,
            reads=_GRANITE.reads | TRAINING | {"num_local_experts", "num_experts_per_tok", "shared_intermediate_size"},
        ),
    ),
    "gpt_oss": Family(
        gguf.MODEL_ARCH.GPT_OSS,
        "silu",
        windows=Windows(2, listed=False),
        head="own",
        biases=(*QKV, "o_proj", "router"),
        renamed={"self_attn.sinks": "self_attn.sinks.weight"},
        places=_oss_places,
        rope=_oss_rope,
        keys=expert_keys,
        notices=_oss_notices,
        reads=TRAINING | {"num_local_experts", "num_experts_per_tok"},
        fixed={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    ),
    "qwen3_next": replace(
        _QWEN35,
        arch=gguf.MODEL_ARCH.QWEN3NEXT,
        changes=_next_changes,
        places=_next_places,
        keys=_next_keys,
        check=_check_next,
        reads=_QWEN35.reads | _QWEN_READS | {"shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": (True,), **_SPARSE},
    ),
    "qwen3_5_moe_text": replace(
        _QWEN35,
        arch=gguf.MODEL_ARCH.QWEN35MOE,
        changes=lambda facts: {**_one_row(facts), **_QWEN35.changes(facts)},
        keys=_qwen35_keys,
        reads=_QWEN35.reads | _QWEN_READS | {"shared_expert_intermediate_size"},
    ),
}
