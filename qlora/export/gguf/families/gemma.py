"""Gemma 1, 3n and 4: norms of three kinds, an embedding for each layer, keys and values that layers share.

Gemma 1 stores its norms less 1, Gemma 3n and 4 do not. Both of these give each layer an embedding of its own beside the
usual one; their last layers have no keys and values but those of the last layer of their kind that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import gguf
import numpy as np
from numpy.typing import NDArray

from qlora.export.gguf import rope
from qlora.export.gguf.experts import block_of, expert_keys
from qlora.export.gguf.family import GELU, Facts, Family, Place, Windows, no_other, norms_plus_one
from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused

# --- Gemma 3n ---------------------------------------------------------------------------------------------------------

# What llama.cpp's graph of Gemma 3n has built in (llama-hparams.h, src/models/gemma3n.cpp), by the key of transformers.
_FIXED_3N = {
    "altup_num_inputs": (4,),
    "altup_active_idx": (0,),
    "laurel_rank": (64,),
    "hidden_size_per_layer_input": (256,),
    "altup_correct_scale": (True,),
    "final_logit_softcapping": (30.0,),  # it does not read the key
    "use_bidirectional_attention": (None, False),
}
_SPARSE_LAYERS, _SPARSITY = 10, 0.95  # the first layers keep the highest 5 % of the gate
_OWN_KV_LAYERS = 20  # layers with keys and values of their own


def _width_3n(facts: Facts) -> int:
    widths = facts.config.intermediate_size
    return int(widths[0] if isinstance(widths, list | tuple) else widths)


def _keys_3n(facts: Facts) -> Sequence[Key]:
    config = facts.config
    return [
        ("feed_forward_length", _width_3n(facts)),
        ("final_logit_softcapping", float(config.final_logit_softcapping)),
        ("altup.active_idx", config.altup_active_idx),
        ("altup.num_inputs", config.altup_num_inputs),
        ("embedding_length_per_layer_input", config.hidden_size_per_layer_input),
        ("attention.shared_kv_layers", config.num_kv_shared_layers),
        ("activation_sparsity_scale", [_multiplier(share) for share in config.activation_sparsity_pattern]),
    ]


def _multiplier(share: float) -> float:
    """How many standard deviations above the mean `share` of normal values end."""
    return NormalDist().inv_cdf(share) if share > 0 else float("-inf")


def _check_3n(facts: Facts) -> None:
    config, widths = facts.config, facts.config.intermediate_size
    if isinstance(widths, list | tuple) and len(set(widths)) > 1:
        raise refused(f"feed-forward parts of {len(set(widths))} widths in gemma3n")
    sparse = [_SPARSITY if layer < _SPARSE_LAYERS else 0.0 for layer in range(facts.layers)]
    if list(config.activation_sparsity_pattern) != sparse:
        raise refused(
            f"this activation_sparsity_pattern of gemma3n (its graph: {_SPARSITY} in {_SPARSE_LAYERS} layers)"
        )
    own = facts.layers - config.num_kv_shared_layers
    if own != min(_OWN_KV_LAYERS, facts.layers):
        raise refused(f"{own} layers with keys of their own in gemma3n (its graph has {_OWN_KV_LAYERS})")
    _check_shared(facts, own)


def _check_shared(facts: Facts, own: int) -> None:
    """The layers that share take the keys of the last (full) or last but one (sliding) layer that has its own."""
    shared = set(facts.sliding[own:])
    last = {kind: own - 1 - facts.sliding[:own][::-1].index(kind) for kind in shared if kind in facts.sliding[:own]}
    if last != {kind: own - (2 if kind else 1) for kind in shared}:
        name = facts.config.model_type
        raise refused(
            f"these layer_types of {name} (the last layer with keys of its own attends fully, that before not)"
        )


def _places_3n(parameter: str, facts: Facts) -> Sequence[Place]:
    """Three projections are one tensor; embeddings by layer have as many rows as the vocabulary."""
    for part, name in (("altup_projections", "altup_proj"), ("altup_unembed_projections", "altup_unembd_proj")):
        if parameter.startswith(f"model.{part}."):
            width, number = facts.config.hidden_size, int(parameter.split(".")[2])
            count = facts.config.altup_num_inputs - 1
            return (Place(f"{name}.weight", at=number * width, stored=(count, width, width)),)
    return _places_by_layer(parameter, facts)


def _unused_3n(facts: Facts) -> Mapping[str, NDArray[np.float32]]:
    """Keys and values of the layers that have none: llama.cpp asks for these tensors, its graph leaves them alone."""
    config = facts.config
    shape = (config.num_key_value_heads * facts.head_dim, config.hidden_size)
    sizes = {"attn_k": shape, "attn_v": shape, "attn_k_norm": (facts.head_dim,)}
    shared = range(facts.layers - config.num_kv_shared_layers, facts.layers)
    names = {f"blk.{layer}.{name}.weight": size for layer in shared for name, size in sizes.items()}
    return {name: np.broadcast_to(np.float32(0), size) for name, size in names.items()}


def _places_by_layer(parameter: str, facts: Facts) -> Sequence[Place]:
    """Tokens beyond those with an embedding by layer (images, sound) have zeros: text has none of them."""
    rows, columns = facts.shapes["model.embed_tokens.weight"][0], facts.shapes.get(parameter, (0, 0))[-1]
    if parameter == "model.embed_tokens_per_layer.weight":
        return (Place("per_layer_token_embd.weight", stored=(rows, columns)),)
    return ()


# --- Gemma 4 ----------------------------------------------------------------------------------------------------------


def _full_layer(facts: Facts) -> int:
    return facts.sliding.index(False)


def _dims_4(facts: Facts) -> tuple[int, int]:
    """A head's dims where it sees all of the text, and where a window of it."""
    layers = facts.config.per_layer_config
    return int(layers[_full_layer(facts)].head_dim), facts.head_dim


def _kv_heads_4(facts: Facts) -> list[int]:
    layers = facts.config.per_layer_config
    return [int(layers[layer].num_key_value_heads) for layer in range(facts.layers)]


def _widths_4(facts: Facts) -> list[int]:
    config = facts.config
    own, wide = facts.layers - config.num_kv_shared_layers, 2 if config.use_double_wide_mlp else 1
    return [config.intermediate_size * (1 if layer < own else wide) for layer in range(facts.layers)]


def _keys_4(facts: Facts) -> Sequence[Key]:
    config, (full, local) = facts.config, _dims_4(facts)
    by_layer = facts.value("hidden_size_per_layer_input") or 0
    keys: list[Key] = [
        ("feed_forward_length", _same(_widths_4(facts))),
        ("attention.head_count_kv", _same(_kv_heads_4(facts))),
        ("attention.key_length", full),
        ("attention.value_length", full),
        ("attention.key_length_swa", local),
        ("attention.value_length_swa", local),
        ("rope.dimension_count", full),
        ("rope.dimension_count_swa", local),
        ("attention.shared_kv_layers", config.num_kv_shared_layers),
        ("embedding_length_per_layer_input", by_layer),
        ("attention.sliding_window", int(config.sliding_window)),
        ("attention.sliding_window_pattern", facts.sliding),
    ]
    # Without this key llama.cpp caps at 30; 0 is no cap.
    return [*keys, ("final_logit_softcapping", float(config.final_logit_softcapping or 0.0))]


def _same(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _rope_4(facts: Facts, model: Mapping[str, ReferenceRope]) -> Rope:
    """Full layers turn their first pairs only: the others are slowed down until they stand still."""
    sections, (full, local) = facts.config.rope_parameters, _dims_4(facts)
    whole, windowed = sections["full_attention"], sections.get("sliding_attention")
    if whole.get("rope_type") not in ("proportional", "default"):
        raise refused(f"full layers with {whole.get('rope_type')!r} positions in gemma4")
    base, factors = rope.number(whole, "rope_theta"), np.ones(full // 2)
    share = whole.get("partial_rotary_factor") or 1.0 if whole["rope_type"] == "proportional" else 1.0
    factors[int(share * full // 2) :] = _STANDS_STILL
    turned = rope.frequencies(base, full) / factors * (model["full_attention"].frequencies != 0)
    rope.compare(turned / rope.number(whole, "factor", 1.0), 1.0, model["full_attention"])
    if rope.number(whole, "factor", 1.0) != 1.0:
        raise refused("scaled positions in gemma4")
    keys: list[Key] = [("rope.freq_base", base)]
    if windowed:
        if windowed.get("rope_type", "default") != "default":
            raise refused(f"sliding layers with {windowed['rope_type']!r} positions")
        base_swa = rope.number(windowed, "rope_theta")
        rope.compare(rope.frequencies(base_swa, local), 1.0, model["sliding_attention"])
        keys.append(("rope.freq_base_swa", base_swa))
    return Rope(tuple(keys), {"rope_freqs.weight": factors.astype(np.float32)})


_STANDS_STILL = 1e30  # llama.cpp, conversion/gemma.py


def _check_4(facts: Facts) -> None:
    config = facts.config
    if all(facts.sliding):
        raise refused("a gemma4 model without a layer that sees all of the text")
    if config.use_bidirectional_attention == "all":
        raise refused("attention in both directions")
    own = facts.layers - config.num_kv_shared_layers
    if config.num_kv_shared_layers:
        _check_shared(facts, own)


def _mixture(facts: Facts) -> Family | None:
    """Experts beside a dense part: the router has a scale of its own, and each expert one of its result."""
    return _MIXTURE if facts.experts else None


def _mixture_keys(facts: Facts) -> Sequence[Key]:
    return [*_keys_4(facts), *expert_keys(facts)]


def _mixture_places(parameter: str, facts: Facts) -> Sequence[Place]:
    """Two names that gguf's table does not have (gemma4.cpp)."""
    for end, name in ((".router.scale", "ffn_gate_inp"), (".router.per_expert_scale", "ffn_down_exps")):
        if parameter.endswith(end):
            return (Place(f"{block_of(parameter)}.{name}.scale"),)
    return _places_by_layer(parameter, facts)


_READS_4 = frozenset(
    (
        *("final_logit_softcapping", "use_bidirectional_attention", "vocab_size_per_layer_input", "attention_k_eq_v"),
        *("hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp", "per_layer_config"),
        *("num_experts", "top_k_experts", "moe_intermediate_size", "global_head_dim", "num_global_key_value_heads"),
    )
)
_GEMMA_4 = Family(
    gguf.MODEL_ARCH.GEMMA4,
    GELU,
    partial_rope=True,
    windows=Windows(6),
    renamed={"layer_scalar": "layer_scalar.weight"},
    unadapted=("per_layer_model_projection",),
    places=_places_by_layer,
    rope=_rope_4,
    keys=_keys_4,
    check=_check_4,
    reads=_READS_4 | {"enable_moe_block"},
    instead=_mixture,
)
_MIXTURE = replace(_GEMMA_4, places=_mixture_places, fused=True, keys=_mixture_keys, instead=no_other)

FAMILIES: Mapping[str, Family] = {
    "gemma": Family(
        gguf.MODEL_ARCH.GEMMA,
        GELU,
        changes=norms_plus_one,
        head="tied",
        fixed={"use_bidirectional_attention": (None, False)},
    ),
    "gemma3n_text": Family(
        gguf.MODEL_ARCH.GEMMA3N,
        GELU,
        windows=Windows(5),
        renamed={"altup.correct_output_scale": "altup.correct_output_scale.weight"},
        unadapted=("per_layer_model_projection", "altup.modality_router"),
        places=_places_3n,
        constants=_unused_3n,
        keys=_keys_3n,
        check=_check_3n,
        reads=frozenset(
            (
                *("vocab_size_per_layer_input", "num_kv_shared_layers"),
                *("activation_sparsity_pattern", "altup_coef_clip"),  # clipped in training only
            )
        ),
        fixed=_FIXED_3N,
    ),
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
}
