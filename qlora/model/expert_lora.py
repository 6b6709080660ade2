"""Adapters on the experts of a mixture, beside their frozen weights, whatever form these are held in.

peft's own (`ParamWrapper`) needs a floating parameter, and makes the sum of it and all deltas in every forward pass.
Here each projection has A (E, r, in) and B (E, r, out) as parameters of a module beside it, which `step.experts` finds;
peft switches it off and on with the others. What is saved has peft's names and layout (`expert_layout`).

A starts as peft's does (uniform within 1 / sqrt(in), or normal with 1 / r), B is zero. Every expert's matrices are part
of one parameter: an expert that no token of a step went to has a gradient of zeros there, and its moments and weight
decay move it all the same, as peft's and torch's optimizers do. The router's shares show how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.model.expert_layout import PROJECTIONS, ExpertAdapter, in_file, names_in_file, of_file, targets_of
from qlora.model.experts import projections
from qlora.model.weight_names import PREFIX
from qlora.model.weight_receiving import device_of
from qlora.step.expert_lora import AdaptedLinear, How
from qlora.step.experts import ADAPTER, Routing, Stack, stack_of

if TYPE_CHECKING:
    from qlora.recipe.sections import LoraSection


class ExpertLora(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The adapters of all experts of one projection: lora_A (E, r, in), lora_B (E, r, out).

    peft's walk over its layers finds it, and sets whether it is on; of its tensors peft knows nothing.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    @property
    def is_on(self) -> bool:
        return not self.disable_adapters

    def beside(self, stack: Stack, routing: Routing, dtype: torch.dtype, inputs: Tensor, spread: bool) -> Tensor:
        """`inputs` times each row's expert, with its adapter (`step.expert_lora`)."""
        how = How(stack, routing, dtype, self.scale, spread)
        return AdaptedLinear.apply(inputs, self.lora_A, self.lora_B, how)  # type: ignore[no-any-return, no-untyped-call]


def attach(causal_lm: Any, lora: LoraSection, dtype: torch.dtype) -> None:
    """Put adapters on every projection of a mixture's experts, drawn from torch's generator as it is. Raises ModelError
    for a model without experts."""
    found = sorted(projections(causal_lm))
    if not found:
        what = "lora.experts = true: the base is no mixture of experts"
        raise ModelError(what, 'take the line out: target_modules = "all-linear" adapts all of its layers')
    if odd := next((leaf for _, _, leaf in found if leaf not in PROJECTIONS), None):
        what = f"lora.experts = true: {odd} is a projection that no layout of adapters is known for"
        raise ModelError(what, "take the line out: attention and dense layers are adapted beside the frozen experts")
    scale = lora.alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    device = device_of(causal_lm)
    for _, module, leaf in found:
        count, out, width = stack_of(module, leaf).shape
        drawn_on = torch.device("meta") if device.type == "meta" else torch.device("cpu")
        A = torch.empty(count, lora.r, width, device=drawn_on)
        if lora.init == "gaussian":
            nn.init.normal_(A, std=1 / lora.r)
        else:
            nn.init.uniform_(A, -1 / math.sqrt(width), 1 / math.sqrt(width))
        B = torch.zeros(count, lora.r, out, dtype=dtype, device=device)
        module.add_module(leaf + ADAPTER, ExpertLora(A.to(device, dtype), B, scale))


def put_on(causal_lm: Any, experts: Mapping[str, ExpertAdapter], stored: Mapping[str, Tensor]) -> None:
    """Put a saved adapter's matrices beside the experts that they were trained on, frozen, in the precision that they
    were saved in. `stored` are its tensors by peft's names. Raises ModelError where the base has no such experts."""
    held = {name: (module, leaf) for name, module, leaf in projections(causal_lm)}
    for name, module_name in names_in_file(experts).items():
        adapter = experts[name]
        module, leaf = held.get(name, (None, ""))
        reason = "is not in the base" if module is None else misfit_of(adapter, module, leaf)
        if reason:
            raise ModelError(f"the adapter of {name} {reason}", "name the base that it was trained on")
        a, b = (stored[f"{PREFIX}{module_name}.lora_{which}.weight"] for which in "AB")
        A, B = (one.contiguous().to(device_of(causal_lm)) for one in of_file(a, b, adapter.count))
        module.add_module(leaf + ADAPTER, ExpertLora(A, B, adapter.scale).requires_grad_(False))


def misfit_of(adapter: ExpertAdapter, module: Any, leaf: str) -> str:
    """Why an adapter does not belong to a projection of a module of experts, held in any form; "" where it does."""
    count, out, width = stack_of(module, leaf).shape
    transposed = bool(module.is_transposed)
    return adapter.misfit((count, width, out) if transposed else (count, out, width), transposed)


def adapted(causal_lm: Any) -> Iterator[tuple[str, ExpertLora]]:
    """The adapters on experts, by the names of the parameters that they are on."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, ExpertLora):
            yield name.removesuffix(ADAPTER), module


def stored_state(model: Any) -> dict[str, Tensor]:
    """The matrices of the experts of a model with adapters, by peft's names and in its layout."""
    found = dict(adapted(model.get_base_model()))
    state: dict[str, Tensor] = {}
    for name, module_name in names_in_file(found).items():
        pair = in_file(found[name].lora_A.detach(), found[name].lora_B.detach())
        state |= {f"{PREFIX}{module_name}.lora_{which}.weight": one for which, one in zip("AB", pair, strict=True)}
    return state


@torch.no_grad()
def load_state(model: Any, stored: Mapping[str, Tensor]) -> None:
    """Put back what `stored_state` gave, of the same names and shapes."""
    found = dict(adapted(model.get_base_model()))
    for name, module_name in names_in_file(found).items():
        a, b = (stored[f"{PREFIX}{module_name}.lora_{which}.weight"] for which in "AB")
        A, B = of_file(a, b, found[name].lora_A.shape[0])
        found[name].lora_A.copy_(A)
        found[name].lora_B.copy_(B)


def targets(model: Any) -> list[str]:
    """What adapter_config.json says of a model's adapters on experts, as `target_parameters`."""
    causal_lm = model.get_base_model()
    every = {name for name, _ in causal_lm.named_parameters()} | {name for name, _, _ in projections(causal_lm)}
    found = [name for name, _ in adapted(causal_lm)]
    return targets_of(found, every) if found else []
