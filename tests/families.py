"""Tiny random bases of the seven families that are tried in tests, each a folder as a person would download it.

Under a million parameters, a byte-level BPE tokenizer with a ChatML template beside the weights. Weights are drawn
wider than a real initialization (1/sqrt(hidden), norms and biases moved off their neutral value), so that a wrong mask,
position, buffer or scale shows in the logits and cannot hide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")

# Sliding-window families: the window is shorter than the documents of the packing tests.
WINDOW = 12

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, END_OF_TURN_ID = 0, 1, 3
TOKENIZER_TEXT = (
    "The quick brown fox asks the assistant a question and the assistant answers it in one sentence.",
    "user\nWhat is the price of the blue lamp?\nassistant\nThe blue lamp costs forty euros.",
    "system\nYou are a helpful assistant.\nuser\nWhere is the station? assistant: Two streets to the north.",
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": END_OF_TURN_ID,
}
# What a family has of its own: fields that make its tiny model go through the same code as the real one.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"tie_word_embeddings": False, "sliding_window": WINDOW},
}
_MODEL_TYPE = {"gemma3": "gemma3_text"}

# What shares keys and values across layers, or hands each layer an embedding of its own.
GEMMA3N = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 384,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_hidden_layers": 4,
    "intermediate_size": [128] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "head_dim": 16,
    "sliding_window": 12,
}


def make_config(family: str, *, vocab: int = 384, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a family's tiny model; `overrides` win over everything."""
    from transformers import AutoConfig

    fields = {**_SHAPE, **_OWN.get(family, {}), "vocab_size": vocab, **(overrides or {})}
    return AutoConfig.for_model(_MODEL_TYPE.get(family, family), **fields)


def make_model(config: Any, seed: int = 0) -> Any:
    """A plain float32 model of `config`, drawn from `seed` without touching the global random state."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_base(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    tie: bool | None = None,
    vocab: int = 384,
    dtype: Any = None,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a tiny random base of `family` into `folder` (weights in `dtype`, bfloat16 by default) and returns it.

    `tie` says whether embeddings and head share their weight (None: what is usual for the family).
    """
    import torch

    settings = dict(overrides or {})
    if tie is not None:
        settings["tie_word_embeddings"] = tie
    config = make_config(family, vocab=vocab, overrides=settings)
    model = make_model(config, seed).to(dtype or torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if shards > 1:
        split_into_shards(folder, shards)
    make_tokenizer(vocab).save_pretrained(folder)
    return folder


def as_version_4_saves(folder: Path) -> Path:
    """Gives a base the config files that transformers 4 writes, as the hub's bases have them; returns it."""
    from qlora.export.hf import config_for_both, tokenizer_config_for_both

    for name, change in (("config.json", config_for_both), ("tokenizer_config.json", tokenizer_config_for_both)):
        said = change(json.loads((folder / name).read_text()))
        said.pop("rope_parameters", None)
        (folder / name).write_text(json.dumps(said, indent=1))
    return folder


def split_into_shards(folder: Path, shards: int) -> None:
    """Replaces `model.safetensors` by that many files and their index."""
    from safetensors.torch import load_file, save_file

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    whole.unlink()


def make_tokenizer(vocab: int = 384, template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens; ids of SPECIAL_TOKENS are 0 to 3, it adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TOKENIZER_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer
