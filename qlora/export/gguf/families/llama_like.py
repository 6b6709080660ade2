"""Blocks as Llama has them: RMS norms before attention and before a gated feed-forward part, one kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import gguf

from qlora.export.gguf import rope
from qlora.export.gguf.family import OTHERS, QKV, Facts, Family, interleaved, no_changes, vocabulary, whole_width
from qlora.export.gguf.rope import Key, ReferenceRope, Rope, refused

FACTORS = ("llama3", "longrope")


def _no_window(facts: Facts) -> Sequence[Key]:
    """Phi-3's graph warns of a window it does not have: 0 says that there is none (llama.cpp, phi3.cpp)."""
    return [("attention.sliding_window", 0)]


def _no_positions_every_fourth(facts: Facts) -> None:
    """The fourth layer of each four turns nothing (llama.cpp, smollm3.cpp, which reads no key for that)."""
    usual = [int((layer + 1) % 4 != 0) for layer in range(facts.layers)]
    if list(facts.config.no_rope_layers)[: facts.layers] != usual:
        raise refused("no_rope_layers of smollm3 (its graph turns no heads in every fourth layer)")


def _scales(facts: Facts) -> Sequence[Key]:
    """Granite's four multipliers; llama.cpp takes an attention scale of 0 for the usual one."""
    config = facts.config
    return [
        ("vocab_size", facts.shapes["model.embed_tokens.weight"][0]),
        ("embedding_scale", float(config.embedding_multiplier)),
        ("residual_scale", float(config.residual_multiplier)),
        ("attention.scale", float(config.attention_multiplier)),
        ("logit_scale", float(config.logits_scaling)),
    ]


def _check_scales(facts: Facts) -> None:
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        if not float(facts.value(key)):
            raise refused(f"{key} = 0 of {facts.config.model_type}")


def _temperature(facts: Facts) -> Sequence[Key]:
    """Llama 4's scale of queries by their position: 1 + beta ln(1 + floor(position / trained length))."""
    beta = facts.config.rope_parameters.get("llama_4_scaling_beta")
    return [*vocabulary(facts), ("attention.temperature_scale", float(beta) if beta else None)]


def _alpha_rope(facts: Facts, own: Mapping[str, ReferenceRope]) -> Rope:
    """Hunyuan's checkpoints call a larger base "dynamic": base * alpha^(d / (d - 2)), whatever the text's length
    (transformers, HunYuanDenseV1RotaryEmbedding)."""
    config, dims = facts.config, facts.head_dim
    said = config.rope_parameters
    if said.get("rope_type") == "dynamic" and said.get("alpha"):
        base = float(said["rope_theta"]) * float(said["alpha"]) ** (dims / (dims - 2))
        return rope.plain(base, dims, own[""])
    return rope.describe(config, dims, own, ())


_LLAMA = Family(
    gguf.MODEL_ARCH.LLAMA,
    "silu",
    changes=interleaved,
    takes_rope_factors=FACTORS,
    biases=(*QKV, *OTHERS),
    keys=vocabulary,
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    # transformers runs these by its Llama class.
    "exaone": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "mistral": replace(_LLAMA, biases=()),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, "silu", partial_rope=True, biases=QKV, check=whole_width),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, "silu", partial_rope=True),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, "silu", takes_rope_factors=("longrope",), partial_rope=True, keys=_no_window),
    "smollm3": Family(
        gguf.MODEL_ARCH.SMOLLM3,
        "silu",
        changes=interleaved,
        keys=vocabulary,
        check=_no_positions_every_fourth,
        reads=frozenset(("no_rope_layers", "no_rope_layer_interval")),
    ),
    "granite": Family(
        gguf.MODEL_ARCH.GRANITE,
        "silu",
        changes=interleaved,
        takes_rope_factors=FACTORS,
        biases=(*QKV, *OTHERS),
        keys=_scales,
        check=_check_scales,
        reads=frozenset(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")),
    ),
    "ministral3": Family(gguf.MODEL_ARCH.MISTRAL3, "silu", changes=interleaved, keys=_temperature),
    "glm4": Family(gguf.MODEL_ARCH.GLM4, "silu", partial_rope=True, biases=QKV),
    "arcee": Family(
        gguf.MODEL_ARCH.ARCEE, "relu2", changes=interleaved, takes_rope_factors=("llama3",), keys=vocabulary
    ),
    "seed_oss": Family(gguf.MODEL_ARCH.SEED_OSS, "silu", biases=QKV, keys=vocabulary),
    # Like Cohere and GLM, these two turn neighbours in transformers too.
    "ernie4_5": Family(gguf.MODEL_ARCH.ERNIE4_5, "silu", keys=vocabulary),
    "helium": replace(_LLAMA, changes=no_changes),
    "hunyuan_v1_dense": Family(
        gguf.MODEL_ARCH.HUNYUAN_DENSE, "silu", rope=_alpha_rope, keys=vocabulary, reads=frozenset(("eod_token_id",))
    ),
    "ministral": replace(_LLAMA, biases=()),
}
