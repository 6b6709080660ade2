"""Where a model that is loaded has its weights, and how they get there: never is all of it on the device.

A layer that will be streamed is put away as soon as its last matrix has come, and each matrix of it is moved to the
host as it comes: beside what stays, the device holds one matrix. What is loaded reports each parameter (`took`), from a
base's files, from the cache of bases, or on meta for the estimator.

Embeddings are tables of which a micro-batch needs a few rows: on the host they are looked up there, and the rows are
copied. A head that is tied to them is a matrix that the device multiplies by: then nothing is saved, and they stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qlora import device as hardware
from qlora.errors import ModelError
from qlora.events import Notice, Sink
from qlora.forward_facts import host_ids
from qlora.model.layer_blobs import LayerWeights, matrix_at, parts_of, put_part, stacks_of
from qlora.model.meta_model import linear_layers
from qlora.model.reclassed import called_as
from qlora.model.weight_stores import HostStore, Store
from qlora.model.weight_streaming import HINT, StreamedWeights, inside, lack_of
from qlora.step.layerwise import recomputable
from qlora.units import GIB, gib

if TYPE_CHECKING:
    from qlora.recipe.sections import MemorySection, QuantizationSection

_KEPT = "_receiving"  # the attribute of a causal model that is being loaded
_ON_HOST = "_is_on_host"  # of an embedding whose table is the host's
# A value in 4 bit with its constants: 1 / 2 + 1 / 64 + 4 / (64 * 256), at most + 4 / 64 without double quantization.
_BYTES_IN_4BIT = 0.5625
# What computing takes beside the weights: logits of a few tokens, keys and values, one dequantized matrix.
_ROOM_BESIDE_BYTES = GIB
# Rows of an embedding of ids, as a share of the largest one's: tables of positions have fewer, and stay.
_ROWS_SHARE = 0.5


@dataclass(frozen=True)
class Place:
    """What of a model is on the host: its layers, its embeddings. The recipe's [memory], decided."""

    streams: bool = False
    host_embedding: bool = False

    @classmethod
    def of(cls, section: MemorySection) -> Place:
        """As a recipe has it once its "auto" is decided: what is still "auto" is on the device."""
        return cls(section.stream_weights is True, section.embedding == "host")


class Keeper(Store, Protocol):
    """A store that is filled."""

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor of the device's on the host."""

    def put(self, layer: int, weights: LayerWeights) -> None:
        """Keep a layer's weights, which are on the host."""

    def settle(self, sink: Sink) -> None:
        """All are there."""


@dataclass
class Receiving:
    """A model on its way to its place. `missing`: of each layer's matrices, those that have not come."""

    model: Any
    place: Place
    device: torch.device
    store: Keeper | None = None
    tables: frozenset[str] = frozenset()  # embeddings that are looked up on the host
    names: list[str] = field(default_factory=list)
    wanted: list[frozenset[str]] = field(default_factory=list)
    missing: list[set[str]] = field(default_factory=list)
    received: dict[int, LayerWeights] = field(default_factory=dict)

    def begin_again(self) -> None:
        """What has come is not to be used: all of it will come once more."""
        self.missing = [set(wanted) for wanted in self.wanted]
        for weights in self.received.values():
            weights.begin_again()
        self.received.clear()

    def device_of(self, name: str) -> torch.device:
        """Where the parameter `name` is made: the device, but for a table that belongs to the host."""
        return torch.device("cpu") if name.rpartition(".")[0] in self.tables else self.device

    def home_of(self, name: str) -> torch.device:
        """Where what needs no computing is best read to: the host for what is streamed from there."""
        streamed = any(
            name.startswith(f"{layer}.") and name.removeprefix(f"{layer}.") in wanted
            for layer, wanted in zip(self.names, self.wanted, strict=True)
        )
        return torch.device("cpu") if streamed else self.device_of(name)

    def took(self, name: str) -> None:
        """The parameter `name` has its value."""
        for number, layer_name in enumerate(self.names):
            if name.startswith(f"{layer_name}.") and self.store is not None:
                own = name.removeprefix(f"{layer_name}.")
                if own in self.missing[number]:
                    self._took(number, own, self.store)
                return

    def _took(self, number: int, name: str, store: Keeper) -> None:
        layer = self.model.get_submodule(self.names[number])
        _move(matrix_at(layer, name), store)
        self.missing[number].discard(name)
        if not self.missing[number]:
            wanted = self.wanted[number]
            weights = LayerWeights(layer, kept=lambda other: other not in wanted)
            store.put(number, weights)
            weights.take_away(self.device)
            self.received[number] = weights

    def finish(self, sink: Sink) -> None:
        """All has come: from now on the model computes like any other, on its device. Raises ModelError if not all."""
        delattr(self.model, _KEPT)
        if self.place.host_embedding:
            _put_on_host(self.model, self.tables, self.device, sink)
        if self.store is None:
            return
        if lost := sorted(set(range(len(self.names))) - self.received.keys()):
            what = f"{self.names[lost[0]]}.{min(self.missing[lost[0]])} got no value while loading"
            raise ModelError(what, "this model is not supported; use another")
        self.store.settle(sink)
        layers = [self.received[number] for number in range(len(self.names))]
        streamed = StreamedWeights(layers, self.store, self.device)
        streamed.put_into(self.model)
        held, slots = gib(streamed.total_bytes), gib(streamed.device_bytes)
        message = f"weights are streamed: {len(layers)} layers ({held}) through {slots}"
        if not hardware.is_card(self.device):
            message += "; without a GPU that is the same memory, and nothing is saved"
        sink.emit(Notice("memory", message, len(layers)))


def receive(causal_lm: Any, place: Place, device: torch.device, store: Keeper | None = None) -> Receiving:
    """Begin to load a model whose layers have their final form and no values. Raises ModelError where its layers
    cannot be streamed."""
    receiving = Receiving(causal_lm, place, device)
    if place.host_embedding:
        receiving.tables = frozenset(_host_tables(causal_lm))
    if place.streams:
        if lack := lack_of(causal_lm):
            raise ModelError(f"memory.stream_weights: {type(causal_lm).__name__}: {lack}", HINT)
        layers = recomputable(causal_lm)
        full_names = {id(module): name for name, module in causal_lm.named_modules()}
        shared = {name for pair in causal_lm.all_tied_weights_keys.items() for name in pair}
        receiving.store = store or HostStore(len(layers), device)
        receiving.names = [full_names[id(layer)] for layer in layers]
        for name, layer in zip(receiving.names, layers, strict=True):
            own = [key for key, parameter in layer.named_parameters() if parameter.ndim > 1]
            own += [key for key, _ in stacks_of(layer)]
            receiving.wanted.append(frozenset(key for key in own if f"{name}.{key}" not in shared))
        receiving.missing = [set(wanted) for wanted in receiving.wanted]
    setattr(causal_lm, _KEPT, receiving)
    return receiving


def took(causal_lm: Any, name: str) -> None:
    """The parameter or stack `name` of a model that is being loaded has its value."""
    receiving: Receiving | None = vars(causal_lm).get(_KEPT)
    if receiving is not None:
        receiving.took(name)


def place_by_room(causal_lm: Any, quantization: QuantizationSection, device: torch.device) -> Place:
    """For whoever opens a model and has planned nothing: its layers are streamed where a GPU has no room for all of it,
    and they can be."""
    if not hardware.is_card(device) or lack_of(causal_lm):
        return Place()
    linear = sum(layer.weight.numel() for _, layer in linear_layers(causal_lm))
    others = sum(parameter.numel() for parameter in causal_lm.parameters()) - linear
    of_linear = _BYTES_IN_4BIT if quantization.type != "none" else 2
    stacked = sum(stack.nbytes for _, stack in stacks_of(causal_lm))
    needed = linear * of_linear + 2 * others + stacked + _ROOM_BESIDE_BYTES
    return Place(streams=needed > hardware.free_bytes(device))


def device_of(model: Any) -> torch.device:
    """Where a model computes, whatever of it is elsewhere: its head is never."""
    found: torch.device = model.get_output_embeddings().weight.device
    return found


def tables(model: Any) -> list[Tensor]:
    """Of a model's embeddings, those on the host."""
    return [module.weight for module in model.modules() if vars(module).get(_ON_HOST)]


def refuse_on_host(name: str, modules: Iterable[nn.Module]) -> None:
    """Raises ModelError where one of the modules that are to be trained whole as `name` is a table on the host."""
    if any(vars(module).get(_ON_HOST) for module in modules):
        what = f"lora.modules_to_save: {name} is looked up on the host, where nothing is trained"
        raise ModelError(what, 'set memory.embedding = "device"')


def bytes_on_device(model: Any, tensors: Iterable[Tensor]) -> int:
    """Of `tensors` of a model, its frozen ones, what the device holds, and the places that streamed layers take in
    turn."""
    on_host = set(map(id, tables(model)))
    held = sum(tensor.nbytes for tensor in tensors if id(tensor) not in on_host)
    streamed = inside(model)
    return held + (streamed.device_bytes if streamed is not None else 0)


def _move(matrix: Any, store: Keeper) -> None:
    """A matrix and its constants to the host, or a stack of them; small tables stay."""
    if isinstance(matrix, nn.Parameter):
        matrix.requires_grad_(False)
    for part, tensor in list(parts_of(matrix)):
        put_part(matrix, part, store.moved(tensor))


# --- embeddings -------------------------------------------------------------------------------------------------------


def _host_tables(causal_lm: Any) -> Iterator[str]:
    """Names of the embeddings of ids whose table nothing else reads."""
    main = causal_lm.get_input_embeddings()
    shared = {name for pair in causal_lm.all_tied_weights_keys.items() for name in pair}
    for name, module in causal_lm.named_modules():
        large = isinstance(module, nn.Embedding) and module.num_embeddings >= _ROWS_SHARE * main.weight.shape[0]
        if large and f"{name}.weight" not in shared:
            yield name


def _put_on_host(causal_lm: Any, tables: frozenset[str], device: torch.device, sink: Sink) -> None:
    """Have embeddings looked up on the host, and say what that saves."""
    saved = 0
    for name in sorted(tables):
        module = causal_lm.get_submodule(name)
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None or buffer.is_meta else buffer.cpu()
        module.__class__ = _on_host(type(module), device)
        setattr(module, _ON_HOST, True)
        saved += module.weight.nbytes
    message = f"embeddings are looked up on the host: {gib(saved)} less on the device"
    if not saved:
        message = 'memory.embedding = "host" saves nothing: the head multiplies by the same table, which stays'
    sink.emit(Notice("memory", message))


def _on_host(kind: Any, device: torch.device) -> Any:
    """An embedding whose table and buffers are on the host, and whose rows are wanted on `device`."""

    class OnHost(kind):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> Tensor:
            if input_ids.is_meta:
                return torch.empty((*input_ids.shape, self.weight.shape[1]), dtype=self.weight.dtype, device=device)
            rows: Tensor = super().forward(host_ids(input_ids))
            return hardware.pinned(rows, device).to(device, non_blocking=True)

    return called_as(kind, OnHost)
