"""Blocks as Llama has them: RMS norms before attention and before a gated feed-forward part, one kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gguf

from qlora.export.gguf.family import OTHERS, QKV, Facts, Family, interleaved
from qlora.export.gguf.rope import Key, refused


def _vocabulary(facts: Facts) -> Sequence[Key]:
    return [("vocab_size", facts.shapes["model.embed_tokens.weight"][0])]


def _whole_width(facts: Facts) -> None:
    """Its graph takes a head's dims for the width over the heads."""
    heads = facts.config.num_attention_heads
    if facts.head_dim * heads != facts.config.hidden_size:
        name, width = facts.config.model_type, facts.config.hidden_size
        raise refused(f"heads of {facts.head_dim} dims in a {name} model that is {width} wide")


def _no_window(facts: Facts) -> Sequence[Key]:
    """Phi-3's graph warns of a window it does not have: 0 says that there is none (llama.cpp, phi3.cpp)."""
    return [("attention.sliding_window", 0)]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        gguf.MODEL_ARCH.LLAMA,
        "silu",
        changes=interleaved,
        takes_rope_factors=True,
        biases=(*QKV, *OTHERS),
        keys=_vocabulary,
    ),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, "silu", changes=interleaved, takes_rope_factors=True, keys=_vocabulary),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, "silu", partial_rope=True, biases=QKV, check=_whole_width),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, "silu", partial_rope=True),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, "silu", takes_rope_factors=True, partial_rope=True, keys=_no_window),
}
