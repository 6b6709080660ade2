"""Blocks of two kinds: most layers see a window of the text, one of a few sees all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gguf

from qlora.export.gguf.family import GELU, Facts, Family, Windows, norms_plus_one
from qlora.export.gguf.rope import Key, refused

# With so many layers llama.cpp scales Gemma's attention by hidden / heads, else by head_dim (the 27B models).
SPECIAL_SCALE_LAYERS = {"gemma2": 46, "gemma3_text": 62}


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
}
