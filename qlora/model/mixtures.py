"""Mixtures of experts, known by config.json alone, whatever their type calls their experts.

A configuration in which something is said of experts (`num_experts`, `n_routed_experts`, `num_local_experts`,
`moe_num_experts`, DBRX's `ffn_config.moe_num_experts`; defaults of the class included) may be one of a mixture. Whether
it is, its model on meta tells: Jamba with one expert, Granite 4 with none, a DeepSeek whose layers are all dense are
not, and can be trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora.errors import ModelError, foreign_failures
from qlora.model.alternatives import text_model_like
from qlora.model.config_filter import open_config, with_layers

# Of counts of experts: what is chosen a token, shared by all tokens or left without weights is none.
_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?experts$|^experts?_num$")
_NO_COUNT = re.compile(r"shared|zero|group|limited|top")
_ABOUT = re.compile(r"expert|(^|_)moe(_|$)")
# A mixture has experts in one of its first layers, but for a few that begin dense (three, in DeepSeek V3).
_FIRST_LAYERS = 8


def refuse_mixture(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for a mixture of experts, by name, from its config.json alone."""
    with foreign_failures() as failure:
        opened = open_config(config)
    if failure.error:
        return  # what is wrong with it, whoever builds it will say
    values = opened.to_dict()
    if not speaks_of_experts(values):
        return
    text = opened.get_text_config(decoder=True)
    if not isinstance(text, dict) and not _has_experts(text):
        return
    counts = [(key, value) for key, value in _entries(values) if _COUNT.search(key) and not _NO_COUNT.search(key)]
    of_several = next(((key, value) for key, value in counts if isinstance(value, int) and value > 1), None)
    number = f" of {of_several[1]:,} experts ({of_several[0]})" if of_several else " of experts"
    what = f"{where}: {config.get('model_type')} is a mixture{number}, which cannot be held in 4 bit yet"
    raise ModelError(what, f"use a dense model, such as {text_model_like(config.get('model_type'), where)}")


def speaks_of_experts(values: Mapping[str, Any]) -> bool:
    """Whether any key of a configuration is about experts."""
    return any(_ABOUT.search(key) for key, _ in _entries(values))


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration and of its parts."""
    waiting: list[Any] = [values]
    while waiting:
        for key, value in waiting.pop().items():
            yield str(key), value
            if isinstance(value, dict):
                waiting.append(value)


def _has_experts(text: Any) -> bool:
    """Whether the causal model of a configuration has weights of experts; so it is where it cannot be built."""
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    for count in sorted({min(layers, _FIRST_LAYERS), layers}):
        names: list[str] = []
        with foreign_failures() as failure:
            names = _parameters(with_layers(text, count) if count < layers else text)
        if any(re.search(r"(^|\.|_)experts?\.|\.block_sparse_moe\.|\.router\.", name) for name in names):
            return True
        if failure.error and count == layers:
            return True
    return False


def _parameters(text: Any) -> list[str]:
    """Names of a causal model's parameters, shared experts' left out."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16, trust_remote_code=False)
    return [name for name, _ in model.named_parameters() if "shared_expert" not in name]
