"""A base in the form that loading gives it, made without a file: of no bytes for the estimator, or of random numbers.

The same functions quantize and place it as in `load`, so that a dispatch mode sees the same storages as loading makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.events import Sinks
from qlora.model import experts
from qlora.model.four_bit_layers import set_4bit, swap_linear
from qlora.model.load import freeze
from qlora.model.meta_model import linear_layers
from qlora.model.mxfp4 import Mxfp4Stack
from qlora.model.nf4 import quantize_rows
from qlora.model.weight_receiving import Keeper, Place, receive, took
from qlora.third_party import import_bitsandbytes

if TYPE_CHECKING:
    from qlora.recipe.sections import QuantizationSection

SPREAD = 0.02  # of random weights: transformers' usual initializer_range
_SPREAD_SCALE = 120  # of MXFP4: codes of any kind have a spread of 2.9, times 2^-7 that is 0.023


def load_nothing(
    model: Any, quantization: QuantizationSection, place: Place | None = None, store: Keeper | None = None
) -> None:
    """Give a model on `meta` the final form that `load_base` gives it, without a byte of weights.

    What of it is on the host by `place` is kept by `store`, which counts it.
    """
    meta = torch.device("meta")
    ready_to_load_nothing()
    receiving = receive(model, place or Place(), meta, store)
    if quantization.type != "none":
        _fill_linear(model, quantization, meta, _params_on_meta())
    _fill_experts(model, quantization, meta)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, import_bitsandbytes().nn.Params4bit):
            took(model, name)
    freeze(model, meta)
    receiving.finish(Sinks())


def ready_to_load_nothing() -> None:
    """bitsandbytes and peft imported, with what they make once and keep, so that who counts storages counts none of it.

    bitsandbytes keeps its 8-bit code table from the first quantization on, on that one's device: never on meta.
    """
    functional = import_bitsandbytes().functional
    import_module("peft")
    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()


def load_random(model: Any, quantization: QuantizationSection, device: torch.device) -> None:
    """Give a model on `meta` random weights on `device`, layer by layer: matrices of mean 0, vectors of ones."""
    if quantization.type != "none":
        _fill_linear(model, quantization, device, None)
    _fill_experts(model, quantization, device)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(_random(tuple(parameter.shape), device), requires_grad=False)
    model.tie_weights()
    freeze(model, device)


def _fill_linear(model: Any, quantization: QuantizationSection, device: torch.device, kind: Any) -> None:
    for name, linear in list(linear_layers(model)):
        layer = swap_linear(model, name, linear, quantization)
        read: Callable[[int, int], Tensor] = partial(_rows, width=linear.in_features, device=device)
        shape = (linear.out_features, linear.in_features)
        set_4bit(layer, quantize_rows(read, shape, quantization.type, quantization.double_quant, device), kind)
        took(model, f"{name}.weight")


def _fill_experts(model: Any, quantization: QuantizationSection, device: torch.device) -> None:
    experts.hold(model, quantization)
    for name, module, leaf in list(experts.projections(model)):
        held = getattr(module, leaf)
        if isinstance(held, Mxfp4Stack):
            held.allocate(device)
            if device.type != "meta":
                held.codes.random_(256)
                held.scales.fill_(_SPREAD_SCALE)
            took(model, name)
        elif isinstance(slab := held, experts.Slab):
            rows = partial(_rows, width=slab.shape[2], device=device)
            experts.fill(slab, lambda _, rows=rows: rows, device)  # type: ignore[misc]
            took(model, name)


def _rows(start: int, end: int, width: int, device: torch.device) -> Tensor:
    return _random((end - start, width), device)


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(SPREAD)


def _params_on_meta() -> Any:
    """bitsandbytes' parameter, which DoRA copies when it starts: its own copy begins on the CPU and cannot go to meta.

    peft knows the class by its name.
    """
    params = import_bitsandbytes().nn.Params4bit

    class Params4bit(params):  # type: ignore[misc, valid-type]
        def __deepcopy__(self, memo: Any) -> Any:
            kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            settings = {name: getattr(self, name) for name in kept}
            twin = type(self)(self.data.clone(), requires_grad=False, bnb_quantized=True, **settings)
            twin.quant_state = copy.deepcopy(self.quant_state, memo)
            return twin

    return Params4bit
