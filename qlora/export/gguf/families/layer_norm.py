"""Blocks with layer norms, which have biases, and a feed-forward part without a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gguf

from qlora.export.gguf.family import (
    GELU,
    LAYER_NORM_KEY,
    QKV,
    Facts,
    Family,
    interleaved,
    norms_plus_one,
    vocabulary,
    whole_width,
)
from qlora.export.gguf.rope import Key, refused


def _parallel(facts: Facts) -> Sequence[Key]:
    return [*vocabulary(facts), ("use_parallel_residual", bool(facts.config.use_parallel_residual))]


def _logit_scale(facts: Facts) -> Sequence[Key]:
    return [*vocabulary(facts), ("logit_scale", float(facts.config.logit_scale))]


def _check_cohere(facts: Facts) -> None:
    """A scale of 0 is none to its graph."""
    if not facts.config.logit_scale:
        raise refused("logit_scale = 0 of cohere")
    whole_width(facts)


def _olmo(facts: Facts) -> Sequence[Key]:
    """Norms without weights; the epsilon stands in transformers' class (OlmoLayerNorm)."""
    clip = facts.config.clip_qkv
    return [
        *vocabulary(facts),
        (LAYER_NORM_KEY, 1e-5),
        ("attention.clamp_kqv", float(clip) if clip is not None else None),
    ]


_NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "final_layernorm")
FAMILIES: Mapping[str, Family] = {
    "starcoder2": Family(
        gguf.MODEL_ARCH.STARCODER2,
        GELU,
        biases=(*QKV, "o_proj", "c_fc", "c_proj", *_NORMS),
        epsilon=("norm_epsilon", LAYER_NORM_KEY),
        check=whole_width,
        fixed={"use_bias": (True,)},
    ),
    "phi": Family(
        gguf.MODEL_ARCH.PHI2,
        "gelu_new",
        partial_rope=True,
        head="own",
        biases=(*QKV, "dense", "fc1", "fc2", "lm_head", *_NORMS),
        epsilon=("layer_norm_eps", LAYER_NORM_KEY),
        check=whole_width,
    ),
    "nemotron": Family(
        gguf.MODEL_ARCH.NEMOTRON,
        "relu2",
        changes=norms_plus_one,
        partial_rope=True,
        head="own",
        biases=(*QKV, "o_proj", "up_proj", "down_proj", *_NORMS),
        epsilon=("norm_eps", LAYER_NORM_KEY),
        keys=vocabulary,
        check=whole_width,
    ),
    "stablelm": Family(
        gguf.MODEL_ARCH.STABLELM,
        "silu",
        partial_rope=True,
        head="own",
        biases=(*QKV, *_NORMS),
        epsilon=("layer_norm_eps", LAYER_NORM_KEY),
        keys=_parallel,
        check=whole_width,
        reads=frozenset(("use_parallel_residual",)),
    ),
    "cohere": Family(
        gguf.MODEL_ARCH.COMMAND_R,
        "silu",
        head="tied",
        epsilon=("layer_norm_eps", LAYER_NORM_KEY),
        keys=_logit_scale,
        check=_check_cohere,
        reads=frozenset(("logit_scale",)),
        fixed={"use_qk_norm": (False,)},
    ),
    "olmo": Family(
        gguf.MODEL_ARCH.OLMO,
        "silu",
        changes=interleaved,
        epsilon=("", LAYER_NORM_KEY),
        keys=_olmo,
        check=whole_width,
        reads=frozenset(("clip_qkv",)),
    ),
    "jais2": Family(
        gguf.MODEL_ARCH.JAIS2,
        "relu2",
        biases=(*QKV, "o_proj", "up_proj", "down_proj", *_NORMS),
        epsilon=("layer_norm_eps", LAYER_NORM_KEY),
        keys=vocabulary,
        check=whole_width,
        fixed={"attention_bias": (True,), "mlp_bias": (True,)},
    ),
}
