"""Blocks with layer norms, which have biases, and a feed-forward part without a gate."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from qlora.export.gguf.family import GELU, LAYER_NORM_KEY, QKV, Family, norms_plus_one, vocabulary, whole_width

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
}
