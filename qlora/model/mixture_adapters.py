"""Adapters on a mixture of experts: which layers get one, and that peft puts them there and nowhere else.

peft 0.21.2 takes targets whose names end as its table of older mixtures has their experts (`gate_proj`, `up_proj`,
`down_proj`, also in full: `model.layers.0.mlp.down_proj`) out of `target_modules`, and adapts all experts instead, at
twice the rank (`utils/transformers_weight_conversion.py`, `_convert_peft_config_moe`; peft#3711). It does so when it
attaches and when anyone loads. Here its rewriting is off, and what was adapted is compared with what was asked; since
whoever loads the adapter has it on, "all-linear" leaves such layers out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qlora.errors import ModelError
from qlora.events import Notice
from qlora.model.experts import projections
from qlora.model.meta_model import linear_layers
from qlora.model.mixtures import experts_in, routers_in

_FIXED = "merge this adapter to use it, or load it with a peft that carries the fix of peft#3711 (0.21.2 does not)"


def is_mixture(model: Any) -> bool:
    """Whether a causal model has experts."""
    return next(experts_in(model), None) is not None


def rewritten(model: Any, layers: Iterable[str]) -> list[str]:
    """Those linear layers of a mixture that peft would take for its experts, by their names."""
    from peft.utils import transformers_weight_conversion as peft_names

    if not is_mixture(model):
        return []
    family = getattr(peft_names, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model.config.model_type)
    taken: Mapping[str, str] = getattr(peft_names, "_MOE_TARGET_MODULE_MAPPING", {}).get(family) or {}
    return [name for name in layers if name.rpartition(".")[2] in taken]


def loadable(model: Any, layers: Collection[str]) -> list[str]:
    """What "all-linear" means of a mixture's `layers`: all of them but those that peft takes for experts."""
    lost = set(rewritten(model, layers))
    return sorted(name for name in layers if name not in lost)


def refuse(model: Any, name: str, key: str) -> None:
    """Raises ModelError where `name`, under the recipe's `key`, means what chooses experts, or experts themselves."""
    of_experts = [*(own for own, _ in experts_in(model)), *(own for own, _, _ in projections(model))]
    for kind, names in (("chooses or weighs experts and stays as it is", routers_in(model)), ("", of_experts)):
        if any(own == name or own.endswith(f".{name}") for own in names):
            what = f"{key}: {name} {kind}" if kind else f"{key}: {name} are experts, which take no adapter yet"
            raise ModelError(what, "leave it out: attention and dense layers are adapted beside the frozen experts")


def adapted_layers(model: Any) -> set[str]:
    """The layers of a causal model that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_adapted(model: Any, asked: set[str]) -> None:
    """Raises ModelError where peft has put adapters elsewhere on a mixture than it was asked to."""
    if is_mixture(model) and (adapted := adapted_layers(model)) != asked:
        odd = min(asked ^ adapted)
        what = f"peft has adapted {len(adapted):,} layers, not the {len(asked):,} that were asked for ({odd})"
        raise ModelError(what, "use the version of peft that this one was tested with, and report it")


@contextmanager
def names_kept(model: Any) -> Iterator[None]:
    """Inside the block peft takes a mixture's layers by the names that it is given, when it attaches and loads."""
    from peft.utils import transformers_weight_conversion as peft_names

    own = {"convert_peft_config_for_transformers": _nothing, "convert_peft_adapter_state_dict_for_transformers": _state}
    before = {name: getattr(peft_names, name) for name in own if is_mixture(model) and hasattr(peft_names, name)}
    try:
        for name in before:
            setattr(peft_names, name, own[name])
        yield
    finally:
        for name, function in before.items():
            setattr(peft_names, name, function)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _state(model: Any, peft_config: Any, adapter_state_dict: Any, adapter_name: str = "") -> Any:
    return adapter_state_dict


def notices(model: Any) -> Iterator[Notice]:
    """What a reader of the recipe must know of a tuned mixture: what is not adapted, and who can load what is."""
    causal_lm: nn.Module = model.get_base_model()
    if not is_mixture(causal_lm):
        return
    adapted = adapted_layers(causal_lm)
    layers = {name for name, _ in linear_layers(causal_lm) if ".lora_" not in name}
    layers = {name.removesuffix(".base_layer") for name in layers}
    yield Notice("adapters", "experts and routers stay frozen: adapters are on the layers beside them", len(adapted))
    if taken := rewritten(causal_lm, adapted):
        message = f"peft takes layers such as {taken[0]} for experts when it loads an adapter: {_FIXED}"
        yield Notice("adapters", message, len(taken))
    elif left := rewritten(causal_lm, layers - adapted):
        message = f"dense and shared layers such as {left[0]} get no adapter, since peft takes them for experts: name"
        yield Notice("adapters", f"{message} them in lora.target_modules to train them, and {_FIXED}", len(left))
