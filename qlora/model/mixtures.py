"""Mixtures of experts: which modules of a model are experts or routers, and which mixtures cannot be held.

Experts are known by transformers' own interface: modules whose class it has decorated (`use_experts_implementation`)
compute through a function of a registered name, whatever their family. Experts outside of it (DBRX's, Llama 4's) are
computed by code of their own, which no other form of their weights fits: these families are refused by config.json
alone. A configuration in which something is said of experts may be one of them; its model on meta tells whether it is
(Jamba with one expert, Granite 4 with none, a DeepSeek whose layers are all dense have none at all).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora.errors import ModelError, foreign_failures
from qlora.model import mxfp4_config
from qlora.model.alternatives import text_model_like
from qlora.model.config_filter import open_config, with_layers

# Of counts of experts: what is chosen a token, shared by all tokens or left without weights is none.
_COUNT = re.compile(r"(^|_)(num|n)_(\w+_)?experts$|^experts?_num$")
_NO_COUNT = re.compile(r"shared|zero|group|limited|top")
_ABOUT = re.compile(r"expert|(^|_)moe(_|$)")
_EXPERTS = re.compile(r"(^|\.|_)experts?\.|\.block_sparse_moe\.")
_ROUTER = re.compile(r"\.(router|gate|\w*shared_\w+)\.|e_score|shared_expert")
# A mixture has experts in one of its first layers, but for a few that begin dense (three, in DeepSeek V3).
_FIRST_LAYERS = 8


# What `use_experts_implementation` sets on each instance (transformers/integrations/moe.py).
_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
# What chooses experts: in some families an nn.Linear like any other (Gemma 4, Phi-3.5-MoE, Hunyuan), and so is what
# weighs a shared expert. In 4 bit a flipped choice would be another expert.
_ROUTERS = ("router", "gate", "shared_expert_gate")


def experts_in(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a model that are experts in transformers' interface, by name."""
    for name, module in model.named_modules():
        if all(attribute in vars(module) for attribute in _DECORATED):
            yield name, module


def routers_in(model: Any) -> frozenset[str]:
    """Names of all modules that are, or stand in, what chooses or weighs the experts beside them."""
    owners = {name.rpartition(".")[0] for name, _ in experts_in(model)}
    roots = [f"{owner}.{name}" if owner else name for owner in owners for name in _ROUTERS]
    return frozenset(
        name for name, _ in model.named_modules() if any(name == root or name.startswith(f"{root}.") for root in roots)
    )


def experts_and_routers(model: Any) -> Iterator[tuple[str, Any]]:
    """The modules of both kinds, whose weights are no linear layer's."""
    routers = routers_in(model)
    yield from experts_in(model)
    yield from ((name, module) for name, module in model.named_modules() if name in routers)


def refuse_mixture(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for a mixture of experts that cannot be held, by name, from its config.json alone."""
    with foreign_failures() as failure:
        opened = open_config(config)
    if failure.error:
        return  # what is wrong with it, whoever builds it will say
    values = opened.to_dict()
    if not speaks_of_experts(values):
        return
    text = opened.get_text_config(decoder=True)
    if isinstance(text, dict):
        reason = "which transformers knows no text model of"
    elif not (reason := _lack(text, "quantization_config" in config and not mxfp4_config.is_stated(config))):
        return
    counts = [(key, value) for key, value in _entries(values) if _COUNT.search(key) and not _NO_COUNT.search(key)]
    of_several = next(((key, value) for key, value in counts if isinstance(value, int) and value > 1), None)
    number = f" of {of_several[1]:,} experts ({of_several[0]})" if of_several else " of experts"
    what = f"{where}: {config.get('model_type')} is a mixture{number}, {reason}"
    raise ModelError(what, f"use another model, such as {text_model_like(config.get('model_type'), where)}")


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


def _lack(text: Any, stored_4bit: bool) -> str:
    """Why the experts of a configuration's causal model cannot be held; "" where they can, or where it has none."""
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    for count in sorted({min(layers, _FIRST_LAYERS), layers}):
        model: Any = None
        with foreign_failures() as failure:
            model = _on_meta(with_layers(text, count) if count < layers else text)
        if model is not None:
            inside = tuple(f"{name}." for name, _ in experts_in(model))
            names = [name for name, _ in model.named_parameters() if _EXPERTS.search(name)]
            if any(not name.startswith(inside) and not _ROUTER.search(name) for name in names):
                return "computed by code of its own, whose weights have no other form than 16 bit"
            if inside and stored_4bit:
                return "stored in 4 bit, which is not read here: name its original in 16 bit"
            if inside:
                return ""
        elif count == layers:
            return f"which transformers cannot build ({failure.reason})"
    return ""


def _on_meta(text: Any) -> Any:
    """A causal model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16, trust_remote_code=False)
