"""What runs a decoder layer has two partners: who holds its weights, and who holds its input for the backward pass.

`step/layerwise.py` asks both. Here is what each of them is asked, and the two that do nothing: everything is in the
device's memory all along. A layer is known by its number, from the first to the last that is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from qlora.errors import ModelError

_HELD_BY = "_layer_weights"  # the attribute of a causal model whose layers' weights somebody holds
_UNREAD = "_unread_inputs"  # of a layer: names of what it is handed and no layer reads
# Of what a layer is handed beside hidden states, these are the same whenever it is computed.
_CONSTANTS = (bool, int, float, str, type(None))


class Weights(Protocol):
    """Where the frozen weights of layers are."""

    def use(self, layer: int, ahead: int | None) -> None:
        """From now on until `release` the layer's weights are on the device. `ahead` is the layer that comes next,
        whose weights may be on their way meanwhile; None where none does. Calls for one layer may be nested."""

    def release(self, layer: int) -> None:
        """What `use` began is over, however it ended."""


class Inputs(Protocol):
    """Where a layer's input (B, S, D) waits for the backward pass."""

    def keep(self, layer: int, x: Tensor) -> Any:
        """Keep `x`, before the layer is computed, and give a ticket for it."""

    def give(self, ticket: Any) -> Tensor:
        """The input of a ticket, on the device and with its bits, once; the ticket's layer is gone back through now, so
        that the one before it is wanted next."""


class Resident:
    """All weights are on the device."""

    def use(self, layer: int, ahead: int | None) -> None:
        pass

    def release(self, layer: int) -> None:
        pass


class OnDevice:
    """Inputs stay where they are. One that was changed in its place is an error, as it is for autograd."""

    def keep(self, layer: int, x: Tensor) -> tuple[Tensor, int]:
        return x, x._version

    def give(self, ticket: tuple[Tensor, int]) -> Tensor:
        x, version = ticket
        if x._version != version:
            raise RuntimeError("the input of a layer that is recomputed was changed in its place")
        return x


RESIDENT, ON_DEVICE = Resident(), OnDevice()


def hold(causal_lm: Any, weights: Weights) -> None:
    """From now on `weights` holds those of the layers of a causal model."""
    setattr(causal_lm, _HELD_BY, weights)


def weights_of(causal_lm: Any) -> Weights:
    """Who holds the weights of the layers of a causal model (the one inside of peft's wrapper)."""
    found: Weights = vars(causal_lm).get(_HELD_BY, RESIDENT)
    return found


def let_unread(layer: Any, name: str) -> None:
    """What `layer` is handed as `name` ties it to no other layer."""
    setattr(layer, _UNREAD, (*getattr(layer, _UNREAD, ()), name))


def number_of(layer: Any, numbers: Mapping[int, int], weights: Weights) -> int:
    """The number of a layer, by its identity. One that is not among them has none: 0 stands for it where all weights
    are on the device. Raises ModelError where they are not: it would be computed with those of another layer."""
    number = numbers.get(id(layer))
    if number is None and weights is not RESIDENT:
        what = f"a layer ({type(layer).__name__}) is not among those whose weights are streamed"
        raise ModelError(what, "set memory.stream_weights = false")
    return number or 0


def is_closed(layer: Callable[..., Any], inputs: tuple[Any, ...]) -> bool:
    """Whether hidden states are all that a layer takes from other layers, and gives to them."""
    named = layer.keywords if isinstance(layer, partial) else {}
    unread = getattr(module_of(layer), _UNREAD, ())
    read = (value for name, value in named.items() if name not in unread)
    return isinstance(inputs[0], Tensor) and all(map(_is_constant, (*inputs[1:], *read)))


def module_of(layer: Callable[..., Any]) -> Any:
    """The layer behind what transformers hands us: the first argument of a class's forward, or, in versions up to
    5.3, what a method is bound to. None where it is neither."""
    if not isinstance(layer, partial):
        return None
    return layer.args[0] if layer.args else getattr(layer.func, "__self__", None)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    made = getattr(type(value), "__dataclass_params__", None)
    if made is not None and made.frozen:  # such as a mask by documents, with its micro-batch
        return all(_is_constant(getattr(value, one.name)) for one in fields(value))
    return isinstance(value, _CONSTANTS) or (isinstance(value, Tensor) and not value.requires_grad)
