"""DeepSeek V2 and V3, and what is built as they are (GLM-4.7-Flash): keys and values of all heads from one latent.

llama.cpp attends to the latents themselves (multi-query attention over them: one key head of rank + rotated dims), so
that `kv_b_proj`, which makes each head's keys and values of a latent, becomes two stacks of matrices by head:
`attn_k_b` (heads, rank, nope), that a query is multiplied with, its rows turned over, and `attn_v_b` (heads, v, rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf
import torch
from torch import Tensor

from qlora.export.gguf import rope
from qlora.export.gguf.experts import block_of, expert_keys
from qlora.export.gguf.families.mixtures import SIGMOID, SOFTMAX, TRAINING
from qlora.export.gguf.family import Change, Facts, Family, Place, Shape
from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused

# Beside these numbers of layers (DeepSeek-V2-Lite, and a cut of it) llama.cpp asks for low-rank queries.
LITE_LAYERS = (26, 27)


def _latent_places(parameter: str, facts: Facts) -> Sequence[Place]:
    if not parameter.endswith(".self_attn.kv_b_proj.weight"):
        return ()
    config, block = facts.config, block_of(parameter)
    nope, each, rank = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    unit = nope + each
    keys, values = _of_heads(slice(0, nope), unit, turned=True), _of_heads(slice(nope, unit), unit, turned=False)
    heads = config.num_attention_heads
    return (
        Place(f"{block}.attn_k_b.weight", stored=(heads, rank, nope), change=keys, unit=unit),
        Place(f"{block}.attn_v_b.weight", stored=(heads, each, rank), change=values, unit=unit),
    )


def _of_heads(share: slice, unit: int, turned: bool) -> Change:
    """A share of each head's `unit` rows as a matrix a head, turned over or not."""
    count = share.stop - share.start

    def to_gguf(rows: Tensor, _: int) -> Tensor:
        found = rows.reshape(-1, unit, rows.shape[-1])[:, share]
        return (found.transpose(1, 2) if turned else found).contiguous()

    def inverse(rows: Tensor, _: int) -> Tensor:
        own = rows.transpose(1, 2) if turned else rows
        whole = torch.zeros(own.shape[0], unit, own.shape[2], dtype=own.dtype)
        whole[:, share] = own
        return whole.reshape(-1, own.shape[2])

    def shape(own: Shape) -> Shape:
        heads = own[0] // unit
        return (heads, own[1], count) if turned else (heads, count, own[1])

    return Change("keys by head" if turned else "values by head", to_gguf, inverse, shape=shape)


def _dense(facts: Facts) -> int:
    """How many layers have no experts; they must be the first."""
    sparse = {int(block_of(tensor.projection).removeprefix("blk.")) for tensor in facts.experts.values()}
    dense = facts.layers - len(sparse)
    if sparse != set(range(dense, facts.layers)):
        raise refused(f"layers without experts behind layers with them in {facts.config.model_type}")
    return dense


def _groups(facts: Facts) -> int:
    """Of experts, of which a token's must be in a few."""
    if facts.value("topk_method") == "greedy":
        return 1
    return int(facts.value("n_group") or 1)


def routed_keys(facts: Facts) -> list[Key]:
    """Experts as DeepSeek has them: dense layers first, shared experts, and how scores become weights."""
    config = facts.config
    groups = _groups(facts)
    return [
        *expert_keys(facts),
        ("leading_dense_block_count", _dense(facts)),
        ("expert_shared_count", int(config.n_shared_experts or 0)),
        ("expert_weights_scale", float(config.routed_scaling_factor)),
        ("expert_weights_norm", bool(facts.value("norm_topk_prob")) and config.model_type != "deepseek_v2"),
        ("expert_gating_func", SOFTMAX if config.model_type == "deepseek_v2" else SIGMOID),
        ("expert_group_count", groups if groups > 1 else None),
        ("expert_group_used_count", int(config.topk_group) if groups > 1 else None),
    ]


def _keys(facts: Facts) -> Sequence[Key]:
    config = facts.config
    rank, turned = config.kv_lora_rank, config.qk_rope_head_dim
    return [
        ("vocab_size", facts.shapes["model.embed_tokens.weight"][0]),
        ("attention.head_count_kv", 1),
        ("attention.kv_lora_rank", rank),
        ("attention.q_lora_rank", config.q_lora_rank),
        ("attention.key_length", rank + turned),
        ("attention.value_length", rank),
        ("attention.key_length_mla", config.qk_nope_head_dim + turned),
        ("attention.value_length_mla", config.v_head_dim),
        ("rope.dimension_count", turned),
        *routed_keys(facts),
    ]


def _check(facts: Facts) -> None:
    config = facts.config
    if config.q_lora_rank is None and facts.layers not in LITE_LAYERS:
        what = f"a {config.model_type} model of {facts.layers} layers without low-rank queries"
        raise refused(f"{what} (its graph has them unless there are {' or '.join(map(str, LITE_LAYERS))} layers)")
    if config.model_type == "deepseek_v2" and _groups(facts) > 1:
        raise refused("topk_method = 'group_limited_greedy' of deepseek_v2 (its graph ranks groups by their best two)")


def _rope(facts: Facts, model: Mapping[str, ReferenceRope]) -> Rope:
    """yarn positions as DeepSeek has them: what they scale attention by is a factor on all of it, which llama.cpp takes
    from a key of its own (its log multiplier, llama-context.cpp), not on the rotated dims alone."""
    said = facts.config.rope_parameters
    turned = rope.describe(facts.config, facts.config.qk_rope_head_dim, model, ())
    if said.get("rope_type") != "yarn":
        return turned
    if not said.get("mscale_all_dim") or said.get("mscale") != said["mscale_all_dim"] or "attention_factor" in said:
        raise refused(f"yarn positions of {facts.config.model_type} whose mscale is not their mscale_all_dim")
    keys = tuple(pair for pair in turned.keys if pair[0] != "rope.scaling.attn_factor")
    multiplier = 0.1 * rope.number(said, "mscale_all_dim")  # YaRN section 3.4
    return Rope((*keys, ("rope.scaling.yarn_log_multiplier", multiplier)), turned.tensors)


_READS = TRAINING | {
    *("kv_lora_rank", "q_lora_rank", "n_group", "topk_group", "n_routed_experts", "n_shared_experts"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor", "norm_topk_prob"),
    *("num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "num_mtp_layers", "mlp_layer_types"),
}
_FIXED: Mapping[str, tuple[Any, ...]] = {"rope_interleave": (True, None)}
_BIAS = {"e_score_correction_bias": "e_score_correction.bias"}
# A file of adapters on these loads and changes nothing (shown): the graph multiplies by them as by plain matrices.
_PASSED_OVER = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "self_attn.q_proj", "lm_head")
_DEEPSEEK = Family(
    gguf.MODEL_ARCH.DEEPSEEK2,
    "silu",
    partial_rope=True,
    head="own",
    unadapted=_PASSED_OVER,
    renamed=_BIAS,
    places=_latent_places,
    rope=_rope,
    keys=_keys,
    check=_check,
    reads=_READS,
    fixed=_FIXED,
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": replace(_DEEPSEEK, reads=_READS | {"topk_method"}),
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm4_moe": Family(
        gguf.MODEL_ARCH.GLM4_MOE,
        "silu",
        partial_rope=True,
        biases=("q_proj", "k_proj", "v_proj"),
        renamed=_BIAS,
        keys=routed_keys,
        reads=_READS,
    ),
}
