"""What a stranger may write into config.json, and what is said of it."""

from __future__ import annotations

from typing import Any

# Keys of config.json, and what is said of them. Found by trying 19 kinds of value on each of 55 keys.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"a billion {key}": ({key: 10**9}, f"{key} is 1,000,000,000; at most")
        for key in (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
            *("encoder_layers", "num_experts", "depth", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
            *("max_position_embeddings", "num_attention_heads", "num_key_value_heads", "sliding_window"),
        )
    },
    **{
        f"no {key}": ({key: 0}, f"{key} is 0, a model has at least 1")
        for key in ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    },
    "a billion layers in text_config": (
        {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is",
    ),
    "a billion layers in vision_config": ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden"),
    "a text part that a llama lacks": ({"text_config": {"a": 1}}, "text_config is there, but a llama has no text part"),
    "a text part that is a number": ({"text_config": 7}, "text_config is wrong"),
    "no intermediate_size": ({"intermediate_size": 0}, "its sizes make model|zero-element"),
    "heads that groups do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
    "heads that do not divide the width": ({"num_attention_heads": 3, "num_key_value_heads": 3}, "cannot b.*multiple"),
    "an odd head_dim": ({"head_dim": 3}, "head_dim is 3"),
    "weights beyond all bounds": (
        {"hidden_size": 1 << 20, "intermediate_size": 1 << 20, "num_hidden_layers": 10, "head_dim": 1 << 18},
        "its sizes make [0-9,]+ weights",
    ),
    "sizes of other types": ({"hidden_size": "64; touch x"}, "hidden_size is '64; touch x', which is no whole number"),
    "layers that are a list": ({"num_hidden_layers": [2]}, "cannot b.*num_hidden_layers"),
    "layer_types of another length": ({"layer_types": ["full_attention"] * 7}, "cannot b.*layer_types"),
    "an activation that is none": ({"hidden_act": "os.system"}, "there is no 'os.system' in it"),
    "rope_scaling that is a text": ({"rope_scaling": "x"}, "cannot b.*rope_parameters"),
    "rope_scaling of nonsense": ({"rope_scaling": {"rope_type": "x"}}, "cannot build this model"),
    "a type of weights that is a function": ({"torch_dtype": "load"}, "torch_dtype is 'load'"),
    "tie_word_embeddings of megabytes": ({"tie_word_embeddings": "x" * 5_000_000}, "tie_word_embeddings"),
    "a billion labels": ({"num_labels": 10**9}, "num_labels is 1,000,000,000; at most 100,000 labels"),
    "a million labels": ({"id2label": {str(i): "x" for i in range(10**6)}}, "at most 10,000,000"),
    "a million end tokens": ({"eos_token_id": [1] * 1_000_000}, "eos_token_id"),
    "architectures that are numbers": ({"architectures": [1, 2]}, "architectures"),
    "a model_type of megabytes": ({"model_type": "x" * 5_000_000}, "model_type is wrong"),
}  # fmt: skip
