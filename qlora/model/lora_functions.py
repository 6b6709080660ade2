"""Puts our own functions (`step/lora_linear.py`) in the place of peft's forward passes, where they compute the same.

A layer keeps its place, its names, its parameters and everything else that peft does with it; only what it computes in
a forward pass goes another way: its class becomes a subclass of its class. What is asked for that the functions are not
(adapters off or merged, several at once, autocast) is left to peft, call by call. Weights are read through the module
whenever they are needed, and never kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora import numerics
from qlora.device import is_card
from qlora.events import Notice, Sink
from qlora.model import mixture_adapters, rms_norms, rotary
from qlora.model.adapter_folder import functions_of
from qlora.model.cpu_matmul import product_dtype
from qlora.model.lora_structure import gated_of, sharing_of, unread_of
from qlora.model.nf4 import BLOCK, NESTED_BLOCK, Quantized, dequantize
from qlora.model.reclassed import called_as
from qlora.numerics import Numerics
from qlora.step.kernels import operators, trial
from qlora.step.lora_linear import Adapter, Frozen, Kernels, gated_mlp, shared_input
from qlora.step.tiled_mlp import TILE_ROWS, in_tiles, tiled_mlp

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora.recipe.sections import LoraSection

OURS, PEFT = "qlora", "peft"  # who computes a linear layer with its adapter; runs of before had the first
NORMED = "qlora, norms too"  # ours, and norms by a function of torch's operations: a new run's without Triton
IN_TRITON = "qlora in Triton"  # ours, with what lies between products in kernels: norms and dequantizing too
FUSED = "qlora in Triton, fused"  # and queries and keys are turned by a kernel; adapters of an MLP are added in one
_KERNELS = {OURS: Kernels.NONE, NORMED: Kernels.NONE, IN_TRITON: Kernels.SINGLE, FUSED: Kernels.FUSED}
# Answers are written a token at a time: bitsandbytes' kernel for few rows reads a GPU's weight without dequantizing it.
FEW_ROWS = 16


def choose(lora: LoraSection, recorded: Numerics | None = None, kernels: bool = False) -> str:
    """Who computes the linear layers of a run: a run that goes on, as it began (`recorded`); versions before this one
    knew peft alone, and recorded nothing or that. `kernels`: those in Triton run on its device."""
    if _lack_in(lora):
        return PEFT
    new = FUSED if kernels else NORMED
    return new if recorded is None else again(recorded.functions, kernels)


def again(recorded: str | None, kernels: bool) -> str:
    """Who computes here what `recorded` computed before: the numbers of a run, and of what it delivered, go on."""
    if recorded is None or recorded not in _KERNELS:
        return PEFT
    return recorded if kernels or _KERNELS[recorded] == Kernels.NONE else NORMED


def of_run() -> str:
    """As the run under way has it; outside of one it is peft, but for a saved adapter (`of_saved`)."""
    run = numerics.of_run()
    return (run.functions if run else None) or PEFT


def tile_of_run() -> int | None:
    """Rows of a tile of an MLP, as the run under way has it, and outside of one as a new run; None: always whole."""
    return run.mlp_tile if (run := numerics.of_run()) else TILE_ROWS


def of_saved(folder: Path, device: torch.device) -> str:
    """As a run computed and measured the adapter that it delivered in `folder`; peft, where nothing there says so."""
    return again(functions_of(folder), trial.work(device))


def put_in(model: PeftModel, functions: str) -> None:
    """Has every layer of a model with adapters computed by `functions`, as far as it can be."""
    if functions not in _KERNELS:
        return
    kernels, causal_lm = _KERNELS[functions], model.get_base_model()
    if kernels == Kernels.FUSED:
        rotary.put_in(causal_lm)
    layers = {name: one for name, one in causal_lm.named_modules() if _is_lora(one) and not lack_of(one)}
    gated = gated_of(layers, causal_lm)
    taken = {id(getattr(one.module, name)) for one in gated for name in one.layers}
    shared: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    modules: dict[int, Any] = {}
    for one in sharing_of({name: layer for name, layer in layers.items() if id(layer) not in taken}, causal_lm):
        shared[id(one.module)].append(one.layers)
        modules[id(one.module)] = one.module
    unread = unread_of(gated, causal_lm)
    kind_of: Any = type  # for mypy, to which a class is no key of a cache
    kinds: dict[int, Any] = {id(layer): _linear(kind_of(layer), kernels) for layer in layers.values()}
    tile = tile_of_run()
    for mlp in gated:
        how = (kernels, id(mlp.module) in unread, tile)
        kinds[id(mlp.module)] = _mlp(kind_of(mlp.module), mlp.layers, *how)
    kinds |= {key: _with_shared(kind_of(module), tuple(shared[key])) for key, module in modules.items()}
    for module in causal_lm.modules():
        module.__class__ = kinds.get(id(module), module.__class__)
    if functions != OURS:
        rms_norms.put_in(causal_lm, by_kernel=kernels != Kernels.NONE)


def say_what_stays(model: PeftModel, lora: LoraSection, sink: Sink) -> None:
    """One notice of the layers that peft computes though they would be ours in a new run, and why; and one where a
    model turns queries and keys in a way that no kernel knows."""
    layers = [one for one in model.modules() if _is_lora(one)]
    for notice in mixture_adapters.notices(model):
        sink.emit(notice)
    lacks = [lack for one in layers if (lack := _lack_in(lora) or lack_of(one))]
    if lacks:
        message = f"linear layers that peft computes, in more memory and time: {'; '.join(sorted(set(lacks)))}"
        sink.emit(Notice("adapters", message, len(lacks)))
    if of_run() == FUSED and (own := rotary.not_turned(model)):
        message = "queries and keys are turned by the model's own function, which no kernel computes, in more time"
        sink.emit(Notice("adapters", message, own))


def lack_of(layer: Any) -> str:
    """Why peft's forward pass of one of its layers stays; "" where ours computes the same."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    base = layer.base_layer
    if not isinstance(layer, (Linear, Linear4bit)) or not isinstance(base, nn.Linear) or layer.fan_in_fan_out:
        return f"an adapter on a {type(base).__name__} is another function"
    if layer.lora_variant:
        return "DoRA is another function"
    if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()):
        return "lora.dropout is not 0"
    if any(layer.lora_bias.values()):
        return "the adapter has a bias"
    trained = any(one.requires_grad for one in base.parameters())
    return "the layer itself is trained" if trained else ""


def _lack_in(lora: LoraSection) -> str:
    if lora.use_dora:
        return "DoRA is another function"
    return "lora.dropout is not 0" if lora.dropout else ""


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


# --- one call ---------------------------------------------------------------------------------------------------------


def _compute_dtype(base: Any) -> torch.dtype:
    dtype: torch.dtype | None = getattr(base, "compute_dtype", None)
    return dtype or base.weight.dtype


def _weight_of(base: Any, dtype: torch.dtype, kernels: bool) -> Tensor:
    """The frozen weight (out, in) as it is now; dequantized as a merge on nf4 does it, by three kernels or by one."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight  # type: ignore[no-any-return]
    if kernels and state.nested and (state.blocksize, state.state2.blocksize) == (BLOCK, NESTED_BLOCK):
        tables = (state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
        return operators.dequantize(base.weight.data, tables, tuple(state.shape), dtype)
    return dequantize(Quantized(base.weight.data, state), dtype)


def _now(layers: Sequence[Any], inputs: Tensor) -> tuple[list[Frozen], list[Adapter], torch.dtype] | None:
    """What layers compute with at this call, and the type of their inputs; None where it is peft's to compute."""
    few = not torch.is_grad_enabled() and inputs.numel() <= FEW_ROWS * inputs.shape[-1]
    autocast = not inputs.is_meta and torch.is_autocast_enabled(
        inputs.device.type
    )  # which meta tensors know nothing of
    if autocast or (few and is_card(inputs.device)):
        return None
    frozen, adapters, kinds = [], [], set()
    for layer in layers:
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1 or layer.disable_adapters or layer.merged:
            return None
        base, (name,) = layer.base_layer, active
        adapter = Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight)
        kind = _compute_dtype(base)
        kinds |= {kind, adapter.A.dtype, adapter.B.dtype}
        weight = partial(_weight_of, base, kind, layer._kernels)
        frozen.append(Frozen(weight, base.bias, layer.scaling[name]))
        adapters.append(adapter)
    return (frozen, adapters, kinds.pop()) if len(kinds) == 1 else None


class _Shared:
    """The outputs of layers that are given the same input, from the call of the first of them on."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.inputs: Tensor | None = None
        self.outputs: list[Tensor | None] = []

    def of(self, place: int, inputs: Tensor) -> Tensor | None:
        """The output of the layer at `place`, once; None where it is not to be had like this.

        By place and not by the module: torch's compiler makes one graph of all layers that differ in modules alone.
        """
        if self.inputs is None and (now := _now(self.layers, inputs)) is not None:
            self.outputs = [*_outputs(now, inputs, self.layers[0]._kernels)]
            self.inputs = inputs
        if inputs is not self.inputs:
            return None
        output, self.outputs[place] = self.outputs[place], None
        return output


def _outputs(now: tuple[list[Frozen], list[Adapter], torch.dtype], inputs: Tensor, kernels: Kernels) -> list[Tensor]:
    frozen, adapters, kind = now
    cast = inputs.to(kind)
    return [output.to(inputs.dtype) for output in shared_input(cast, frozen, adapters, product_dtype(cast), kernels)]


@lru_cache(64)
def _linear(kind: Any, kernels: Kernels) -> Any:
    """A layer of peft's whose forward pass is ours."""

    class OneLinear(kind):  # type: ignore[misc]
        _kernels = kernels

        def forward(self, inputs: Tensor, *args: Any, **named: Any) -> Tensor:
            if args or named:
                return super().forward(inputs, *args, **named)  # type: ignore[no-any-return]
            shared = vars(self).get("_shared")
            known = shared[0].of(shared[1], inputs) if shared is not None else None
            if known is not None:
                return known  # type: ignore[no-any-return]
            now = _now([self], inputs)
            return super().forward(inputs) if now is None else _outputs(now, inputs, kernels)[0]

    return called_as(kind, OneLinear)


@lru_cache(64)
def _mlp(kind: Any, names: tuple[str, str, str], kernels: Kernels, unread: bool, tile: int | None) -> Any:
    """A module that computes its three layers as one function, over long rows by a `tile` of them. `unread`: what it
    gives is only added up, by its layer (`lora_structure.unread_of`); hooks may read it."""

    class OneMLP(kind):  # type: ignore[misc]
        def forward(self, inputs: Tensor, *args: Any, **named: Any) -> Tensor:
            layers = [getattr(self, name) for name in names]
            watched = any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
            now = None if watched or args or named else _now(layers, inputs)
            if now is None:
                return super().forward(inputs, *args, **named)  # type: ignore[no-any-return]
            frozen, adapters, dtype = now
            cast = inputs.to(dtype)
            how = (frozen, adapters, product_dtype(cast), kernels, unread and not self._forward_hooks)
            if tile is not None and in_tiles(cast, len(adapters[0].B), tile):
                return tiled_mlp(cast, *how, tile).to(inputs.dtype)
            return gated_mlp(cast, *how).to(inputs.dtype)

    return called_as(kind, OneMLP)


@lru_cache(64)
def _with_shared(kind: Any, groups: tuple[tuple[str, ...], ...]) -> Any:
    """A module inside whose forward pass layers that are given the same input are computed together.

    What waits for the second of them ends with the pass, however it ends: it would hold a whole graph.
    """

    class SharingInputs(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Any:
            members = [[getattr(self, name) for name in names] for names in groups]
            try:
                for layers in members:
                    shared = _Shared(layers)
                    for place, layer in enumerate(layers):
                        vars(layer)["_shared"] = shared, place
                return super().forward(*args, **named)
            finally:
                for layers in members:
                    for layer in layers:
                        vars(layer).pop("_shared", None)

    return called_as(kind, SharingInputs)
