"""Blocks of two kinds: most layers see a window of the text, one of a few sees all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gguf

from qlora.export.gguf.family import (
    GELU,
    LAYER_NORM_KEY,
    Facts,
    Family,
    Windows,
    norms_plus_one,
    vocabulary,
    whole_width,
)
from qlora.export.gguf.rope import Key, refused

# With so many layers llama.cpp scales Gemma's attention by hidden / heads, else by head_dim (the 27B models).
SPECIAL_SCALE_LAYERS = {"gemma2": 46, "gemma3_text": 62}


EXAONE4_WINDOWED_LAYERS = 64


def _softcaps(facts: Facts) -> Sequence[Key]:
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return [(name, float(value)) for name in names if (value := facts.value(name))]


def _check_gemma(facts: Facts) -> None:
    config = facts.config
    special = config.num_hidden_layers == SPECIAL_SCALE_LAYERS[config.model_type]
    scale = config.hidden_size // config.num_attention_heads if special else facts.head_dim
    if config.query_pre_attn_scalar != scale:
        raise refused(f"query_pre_attn_scalar = {config.query_pre_attn_scalar} (its graph scales by {scale})")
    if getattr(config, "use_bidirectional_attention", None):
        raise refused("attention in both directions")


def _logit_scale(facts: Facts) -> Sequence[Key]:
    return [("logit_scale", float(facts.config.logit_scale)), *vocabulary(facts)]


def _check_cohere2(facts: Facts) -> None:
    """Its graph turns heads in the layers with a window alone, and takes a logit scale of 0 for none."""
    if not any(facts.sliding):
        raise refused("a cohere2 model without sliding windows")
    if not facts.config.logit_scale:
        raise refused("logit_scale = 0 of cohere2")
    whole_width(facts)


def _check_olmo3(facts: Facts) -> None:
    """Its graph turns the heads of both kinds of layers from one base, and scales those without a window alone."""
    kinds = facts.config.rope_parameters
    bases = {kinds[kind].get("rope_theta") for kind in ("full_attention", "sliding_attention") if kind in kinds}
    if len(bases) > 1:
        raise refused("another rope_theta for the sliding layers of olmo3 than for the others")
    whole_width(facts)


def _check_exaone4(facts: Facts) -> None:
    """With 64 layers (the 32B model) its graph has windows, and turns heads where they are; with any other number it
    has none and turns all (llama.cpp, exaone4.cpp)."""
    windows, layers = any(facts.sliding), facts.layers
    if windows != (layers == EXAONE4_WINDOWED_LAYERS) or windows != (facts.config.sliding_window is not None):
        has = "windows" if windows else "no windows"
        raise refused(
            f"{has} in an exaone4 model of {layers} layers (its graph has them with 64 layers, and only then)"
        )
    whole_width(facts)


_GEMMA_READS = frozenset(
    ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
)
FAMILIES: Mapping[str, Family] = {
    "gemma2": Family(
        gguf.MODEL_ARCH.GEMMA2,
        GELU,
        changes=norms_plus_one,
        partial_rope=True,
        windows=Windows(2),
        head="tied",
        keys=_softcaps,
        check=_check_gemma,
        reads=_GEMMA_READS,
    ),
    "gemma3_text": Family(
        gguf.MODEL_ARCH.GEMMA3,
        GELU,
        changes=norms_plus_one,
        partial_rope=True,
        windows=Windows(6),
        keys=_softcaps,
        check=_check_gemma,
        reads=_GEMMA_READS,
    ),
    "olmo2": Family(gguf.MODEL_ARCH.OLMO2, "silu", head="own", check=whole_width),
    "olmo3": Family(gguf.MODEL_ARCH.OLMO2, "silu", windows=Windows(4), head="own", check=_check_olmo3),
    "cohere2": Family(
        gguf.MODEL_ARCH.COHERE2,
        "silu",
        windows=Windows(4),
        partial_rope=True,
        head="tied",
        epsilon=("layer_norm_eps", LAYER_NORM_KEY),
        keys=_logit_scale,
        check=_check_cohere2,
        reads=frozenset(("logit_scale",)),
    ),
    "exaone4": Family(
        gguf.MODEL_ARCH.EXAONE4,
        "silu",
        windows=Windows(4),
        takes_rope_factors=("llama3",),
        check=_check_exaone4,
        reads=frozenset(("sliding_window_pattern",)),
    ),
}
