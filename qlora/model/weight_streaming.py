"""The frozen layers of a model on the host or on the disk, and on the device only while they are computed.

Two places on the device, each as large as the largest layer's blob, hold all layers in turn: while one layer is
computed, the next one's weights are copied to the other place, forth and back the same way. A layer's parameters are
views of such a place from `use` to `release`, and have no values in between (`layer_blobs.py`). The bytes are the ones
that a resident model has, so that no number changes. At the top of a model, where going forth turns into going back,
two layers are there already, and as many at its bottom: a micro-batch copies twice the layers, less two.

Whoever computes with a model has nothing to know of that: each layer's forward pass asks for its weights itself, in
training, in evaluation and when answers are written. A backward pass asks by `step/layerwise.py`, which computes every
layer anew; a layer whose tensors were kept instead would go back through weights of another layer, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora.copy_stream import CopyStream
from qlora.device import synchronize
from qlora.errors import ModelError, TrainingStopped
from qlora.layer_partners import hold, is_closed, weights_of
from qlora.model.layer_blobs import LayerWeights
from qlora.model.layer_walk import layers_of
from qlora.model.weight_stores import Arriving, Store
from qlora.out_of_memory import gpu_fault
from qlora.step.layerwise import recomputable

SLOTS = 2
HINT = "set memory.stream_weights = false, or use another base"


@dataclass
class _Slot:
    """A place on the device. `layer`: whose blob is there or on its way; `free`: a point behind its last reader."""

    blob: Tensor
    free: Any
    layer: int | None = None
    arriving: Arriving | None = None
    in_use: bool = False


class Ring:
    """Slots on the device that layers take in turn. They are made when the first layer is asked for."""

    def __init__(self, store: Store, nbytes: int, device: torch.device) -> None:
        self.store, self.nbytes, self.device = store, nbytes, device
        self.copies = CopyStream(device)
        self.slots: list[_Slot] = []
        self.stays = False  # the slots are not given back before the end
        self.sent = 0  # blobs that were copied to the device

    def hold(self, layer: int) -> Tensor:
        """The slot with a layer's blob, which stays there until `let_go`."""
        slot = self._slot_of(layer) or self._send(layer)
        assert slot is not None, "more layers in use than there are slots"
        arriving, slot.arriving, slot.layer = slot.arriving, None, None
        if arriving is not None:
            arriving.arrive()
        slot.layer, slot.in_use = layer, True
        return slot.blob

    def ask_for(self, layer: int) -> None:
        """Has a layer's blob copied to a free slot, where one is and it is in none."""
        if self._slot_of(layer) is None:
            self._send(layer)

    def let_go(self, layer: int) -> None:
        """What has been asked of the device so far is the last that reads it there."""
        slot = self._slot_of(layer)
        if slot is not None:
            slot.in_use, slot.free = False, self.copies.computed()

    def prepare(self) -> None:
        """Make the slots, where there are none."""
        if not self.slots:
            blobs = [torch.empty(self.nbytes, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
            self.slots = [_Slot(blob, self.copies.computed()) for blob in blobs]

    def empty(self) -> None:
        """Give the slots back, once nobody reads or writes them."""
        for slot in self.slots:
            if slot.arriving is not None:
                with suppress(ModelError, TrainingStopped):  # of a layer that nobody has asked for yet
                    slot.arriving.arrive()
        synchronize(self.device)
        if self.stays:
            self.forget()
        else:
            self.slots = []

    def forget(self) -> None:
        """No slot holds a layer, or will: what is on its way to one is waited for by whoever writes there next."""
        for slot in self.slots:
            slot.layer, slot.arriving, slot.in_use, slot.free = None, None, False, self.copies.computed()

    def _slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.layer == layer), None)

    def _send(self, layer: int) -> _Slot | None:
        self.prepare()
        free = [slot for slot in self.slots if not slot.in_use]
        if not free:
            return None
        slot = free[0]
        if slot.arriving is not None:  # what was asked for and is not wanted any more
            slot.arriving.arrive()
            slot.arriving, slot.free = None, self.copies.computed()
        slot.layer = None  # whatever goes wrong now, it holds no layer
        slot.arriving = self.store.send(layer, slot.blob, self.copies, slot.free)
        slot.layer = layer
        self.sent += 1
        return slot


class Ends(Protocol):
    def reset(self) -> None:
        """Its places on the device are given back until they are needed."""

    def close(self) -> None:
        """As `reset`, and what it has on the host."""


class StreamedWeights:
    """The frozen weights of a model's layers, held by a store; `layer_partners.Weights` of who runs the layers."""

    def __init__(
        self, layers: Sequence[LayerWeights], store: Store, device: torch.device, slot_bytes: int | None = None
    ) -> None:
        """`slot_bytes`: where a layer's blob is not all that comes to its place."""
        self.layers, self.store, self.device = tuple(layers), store, device
        self.ring = Ring(store, slot_bytes or max(layer.layout.nbytes for layer in layers), device)
        self.beside: list[Ends] = []  # what else comes and goes, and is given back with the layers
        self._depths = [0] * len(layers)
        self._looked_at = False

    @property
    def device_bytes(self) -> int:
        """What the slots take, and what of the layers is there all along."""
        return SLOTS * self.ring.nbytes + int(getattr(self.store, "device_bytes", 0))

    @property
    def total_bytes(self) -> int:
        """What all layers have, wherever they are."""
        return sum(layer.layout.nbytes for layer in self.layers)

    def use(self, layer: int, ahead: int | None) -> None:
        if not self._depths[layer]:
            self.layers[layer].point(self.ring.hold(layer))
        self._depths[layer] += 1
        # A nested call knows less: transformers up to 5.3 runs a layer's hooks again while it is gone back through.
        if ahead is not None and self._depths[layer] == 1:
            self.ring.ask_for(ahead)

    def release(self, layer: int) -> None:
        if not self._depths[layer]:
            return  # it was not there: asking for it has failed
        self._depths[layer] -= 1
        if not self._depths[layer]:
            self.layers[layer].take_away(self.device)
            self.ring.let_go(layer)

    @contextmanager
    def in_place(self, layer: int) -> Iterator[None]:
        """A layer's weights are there inside, for whoever reads them outside of a forward pass."""
        try:
            self.use(layer, None)
            yield
        finally:
            self.release(layer)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Inside, a pass with a graph is not refused: its graph is looked at, and nobody goes back through it."""
        self._looked_at = True
        try:
            yield
        finally:
            self._looked_at = False

    def reset(self) -> None:
        """No layer is in use, whatever went wrong, and the slots are given back until one is."""
        for number, depth in enumerate(self._depths):
            if depth:
                self.layers[number].take_away(self.device)
        self._depths = [0] * len(self._depths)
        self.ring.empty()
        for one in self.beside:
            one.reset()

    def close(self) -> None:
        """The model can compute nothing any more. A GPU that failed fails here again: why the run ended is known."""
        try:
            self.reset()
        except RuntimeError as error:
            if gpu_fault(error) is None:
                raise
        self.ring.slots = []
        self.store.close()
        for one in self.beside:
            one.close()

    def put_into(self, causal_lm: Any) -> None:
        """From now on each layer's forward pass asks for its weights."""
        for number, layer in enumerate(recomputable(causal_lm)):
            layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            layer.register_forward_hook(partial(self._after, number), always_call=True)
        hold(causal_lm, self)

    def _before(self, number: int, layer: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        following: int | None = (number + 1) % len(self.layers)  # at the top: the next pass begins at the bottom
        if torch.is_grad_enabled() and not self._looked_at and _is_gone_back_through(layer, inputs):
            _refuse_what_is_kept(layer, inputs, named)
        if layer.training:
            following = following or None  # at the top it turns
        self.use(number, following)

    def _after(self, number: int, *_: Any) -> None:
        self.release(number)


def _is_gone_back_through(layer: nn.Module, inputs: tuple[Any, ...]) -> bool:
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    return any(one.requires_grad for one in (*tensors, *layer.parameters()))


def _refuse_what_is_kept(layer: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raises ModelError for a layer that is not computed anew in the backward pass, by itself."""
    kind = type(layer).__name__
    if not (layer.gradient_checkpointing and layer.training):
        what = f"{kind}: streamed weights are gone before the backward pass, and the layer is not recomputed"
        raise ModelError(what, "set train.gradient_checkpointing = true")
    if not inputs or not is_closed(partial(layer.forward, **named), inputs):
        raise ModelError(f"memory.stream_weights: {kind} shares more than hidden states with other layers", HINT)


def inside(model: Any) -> StreamedWeights | None:
    """Who holds the layers of a causal model, with peft's wrapper around it or without; None: they are resident."""
    found = map(weights_of, model.modules())
    return next((one for one in found if isinstance(one, StreamedWeights)), None)


def parts_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """The model, or, where its layers are streamed, one after the other with its weights there while it is had."""
    streamed = inside(model)
    if streamed is None:
        yield model
        return
    for number, layer in enumerate(recomputable(model)):
        with streamed.in_place(number):
            yield layer


def reset(model: Any) -> None:
    """When memory has run out: the places that layers take in turn are given back until the next one is computed."""
    if (streamed := inside(model)) is not None:
        streamed.reset()


def lack_of(causal_lm: Any) -> str:
    """Why the layers of a model cannot be streamed; "" where they can."""
    if not causal_lm.supports_gradient_checkpointing:
        return "transformers cannot recompute its layers"
    if getattr(causal_lm.config.get_text_config(), "num_kv_shared_layers", None):
        return "its layers share keys and values"
    try:
        layers = list(layers_of(causal_lm))
    except LookupError:
        return "no list holds its layers"
    if layers != recomputable(causal_lm):
        return "its layers are not computed one after the other"
    return ""
