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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.errors import ExportError, ModelError
from qlora.events import Notice
from qlora.model import adapter_folder
from qlora.model.adapter_config import shown
from qlora.model.base_folder import BaseFolder
from qlora.model.expert_layout import names_in_file
from qlora.model.experts import projections
from qlora.model.meta_model import build, linear_layers
from qlora.model.mixtures import experts_in, routers_in
from qlora.model.weight_names import PREFIX
from qlora.step.experts import ADAPTER

if TYPE_CHECKING:
    from qlora.recipe.sections import LoraSection

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
            if not kind:
                what = f"{key}: {name} are experts, which are parameters and no layers"
                raise ModelError(what, "write lora.experts = true to adapt all of them, and leave this name out")
            what = f"{key}: {name} {kind}"
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


def attach_to_experts(causal_lm: Any, lora: LoraSection, dtype: torch.dtype) -> None:
    """`expert_lora.attach`; that module and those below it are for mixtures alone, and begin with peft."""
    from qlora.model import expert_lora

    expert_lora.attach(causal_lm, lora, dtype)
    wanted, found = {name for name, _, _ in projections(causal_lm)}, dict(expert_lora.adapted(causal_lm))
    assert found.keys() == wanted, "projections of experts without an adapter"


def with_experts(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What peft gives as the `state` of a tuned model, with its experts' adapters as peft would have saved them."""
    from qlora.model import expert_lora

    own = tuple(f"{name}{ADAPTER}." for name, _ in expert_lora.adapted(model.get_base_model()))
    beside = {name: tensor for name, tensor in state.items() if not name.removeprefix(PREFIX).startswith(own)}
    return {**beside, **expert_lora.stored_state(model)}


def targets_of_experts(model: Any) -> list[str]:
    """What an adapter's configuration says of them (`target_parameters`)."""
    from qlora.model import expert_lora

    return expert_lora.targets(model)


def load_experts(model: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the adapters on experts what `with_experts` gave; what is left of `stored` is peft's to load."""
    from qlora.model import expert_lora

    expert_lora.load_state(model, stored)
    own = expert_lora.stored_state(model)
    return {name: tensor for name, tensor in stored.items() if name not in own}


def parted(folder: Path, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A saved adapter's matrices: those of experts, and those that are peft's to load."""
    modules = names_in_file(adapter_folder.experts_in(folder)).values()
    own = {f"{PREFIX}{module}.lora_{which}.weight" for module in modules for which in "AB"}
    of_experts = {name: stored[name] for name in own}
    return of_experts, {name: tensor for name, tensor in stored.items() if name not in own}


def put_on_experts(causal_lm: Any, folder: Path, of_experts: Mapping[str, Tensor]) -> None:
    """Put a saved adapter's matrices on the experts that are theirs. Raises ModelError where the base has none such."""
    from qlora.model import expert_lora

    expert_lora.put_on(causal_lm, adapter_folder.experts_in(folder), of_experts)


def refuse_other_experts(adapter: adapter_folder.Adapter, base: BaseFolder) -> None:
    """Raises ExportError for adapters on experts that are not the base's, before a weight of it is read."""
    if not adapter.experts:
        return
    from qlora.model import expert_lora

    held = {name: (module, leaf) for name, module, leaf in projections(build(base).model)}
    for name, expert in adapter.experts.items():
        lost = f"is on none of the experts of {base.name}"
        if reason := expert_lora.misfit_of(expert, *held[name]) if name in held else lost:
            what = f"{adapter.folder}: the adapter of {shown(name)} {reason}"
            raise ExportError(what, "name the base that it was trained on, or save it with peft 0.19 or newer")


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
    yield _of_experts(causal_lm, len(adapted))
    if taken := rewritten(causal_lm, adapted):
        message = f"peft takes layers such as {taken[0]} for experts when it loads an adapter: {_FIXED}"
        yield Notice("adapters", message, len(taken))
    elif left := rewritten(causal_lm, layers - adapted):
        message = f"dense and shared layers such as {left[0]} get no adapter, since peft takes them for experts: name"
        yield Notice("adapters", f"{message} them in lora.target_modules to train them, and {_FIXED}", len(left))


def _of_experts(causal_lm: nn.Module, layers: int) -> Notice:
    """Whether experts have adapters, and what the update does to those that nothing went to."""
    from qlora.model import expert_lora

    found = [module for _, module in expert_lora.adapted(causal_lm)]
    if not found:
        return Notice("adapters", "experts and routers stay frozen: adapters are on the layers beside them", layers)
    values = sum(parameter.numel() for module in found for parameter in module.parameters())
    count, rank, _ = found[0].lora_A.shape
    message = (
        f"adapters on the {count} experts of each of {len(found)} projections, rank {rank} ({values:,} values), beside "
        f"those on layers; routers stay frozen. Experts that no token of a step goes to follow their moments and "
        f"weight decay, as peft's do"
    )
    return Notice("adapters", message, len(found))
