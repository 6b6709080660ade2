"""What runs a decoder layer has two partners: who holds its weights, and who holds its input for the backward pass.

`step/layerwise.py` asks both. Here is what each of them is asked, and the two that do nothing: everything is in the
device's memory all along. A layer is known by its number, from the first to the last that is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


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
