"""Tiny multimodal bases, each a folder as its whole class saves it: a text model of a known family, a small vision
tower, and what joins them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.families import WINDOW, make_tokenizer

# (transformers has no causal class for the text part of Qwen 2 to 3 VL, so that these are no bases here.)
KINDS = ("gemma3", "mistral3", "llava", "gemma4", "qwen3_5", "smolvlm")

_TEXT: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14}


def _parts(kind: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of a kind: its text model's own fields, its vision tower, and what stands beside both."""
    if kind == "gemma3":
        text = {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        return text, {"model_type": "siglip_vision_model", **_SIGLIP}, {"mm_tokens_per_image": 1}
    if kind == "gemma4":
        text = {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
        }
        return (
            text,
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            {"audio_config": None},
        )
    if kind == "mistral3":
        vision = {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        return {"model_type": "mistral"}, vision, {"tie_word_embeddings": False}
    if kind == "llava":
        vision = {"model_type": "clip_vision_model", **_SIGLIP}
        return {"model_type": "llama"}, vision, {"tie_word_embeddings": False}
    if kind == "qwen3_5":
        vision = {**_QWEN_VISION, "intermediate_size": 64, "out_hidden_size": 64}
        text = {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        }
        return text, vision, {"tie_word_embeddings": False}
    if kind == "smolvlm":
        return {"model_type": "llama"}, dict(_SIGLIP), {"tie_word_embeddings": False, "scale_factor": 2}
    raise ValueError(kind)


def make_multimodal(kind: str, folder: Path, *, seed: int = 0, dtype: Any = None) -> Path:
    """Writes a tiny random multimodal base (in `dtype`, bfloat16 by default) and returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, whole = _parts(kind)
    config = AutoConfig.for_model(kind, text_config={**_TEXT, **text}, vision_config=vision, **whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases
                    parameter.add_(0.2 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype or torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
