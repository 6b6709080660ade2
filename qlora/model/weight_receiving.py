"""Where a model that is loaded has its weights, and how they get there: never is all of it on the device.

A layer that will be streamed is put away as soon as its last matrix has come, and each matrix of it is moved to the
host as it comes: beside what stays, the device holds one matrix. What is loaded reports each parameter (`took`), from a
base's files, from the cache of bases, or on meta for the estimator.

Embeddings are tables of which a micro-batch needs a few rows: on the host they are looked up there, and the rows are
copied. The head is a matrix that the device multiplies by: with layers and embeddings on the host it is there as well,
and comes in blocks (`head_streaming.py`), tied to them or not. Without streamed layers it stays, with what is tied to
it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qlora import device as hardware
from qlora import gathering, processes
from qlora.errors import ModelError
from qlora.events import Notice, Sink
from qlora.forward_facts import host_ids
from qlora.gathering import part_bytes
from qlora.model import head_streaming
from qlora.model.layer_blobs import LayerWeights, matrix_at, parts_of, put_part, stacks_of
from qlora.model.meta_model import linear_layers
from qlora.model.reclassed import called_as
from qlora.model.weight_sharding import ShardStore
from qlora.model.weight_stores import HostStore, Store
from qlora.model.weight_streaming import StreamedWeights, inside, lack_of
from qlora.step import head_blocks
from qlora.step.head_blocks import device_of as device_of_head
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
    """What of a model is on the host: layers, embeddings, and with both the head. The recipe's [memory], decided.

    `shards`: so many processes hold each layer, a part each (1: nobody shares).
    """

    streams: bool = False
    host_embedding: bool = False
    shards: int = 1

    @property
    def comes_and_goes(self) -> bool:
        """Whether a layer's weights are there only while it is computed."""
        return self.streams or self.shards > 1

    @property
    def host_head(self) -> bool:
        """Whether the head is there too, where that saves something."""
        return self.comes_and_goes and self.host_embedding

    @classmethod
    def of(cls, section: MemorySection) -> Place:
        """As a recipe has it once its "auto" is decided: what is still "auto" is on the device."""
        shards = processes.of_run().size if section.shard_weights is True else 1
        return cls(section.stream_weights is True, section.embedding == "host", shards)


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
    head: str = ""  # that comes in blocks; "": it is on the device
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
        on_host = name.rpartition(".")[0] in self.tables or (self.head and name == f"{self.head}.weight")
        return torch.device("cpu") if on_host else self.device

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
        move_to(matrix_at(layer, name), store)
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
            put_on_host(self.model, self.tables, self.device, sink, bool(self.head))
        if self.store is None:
            return
        if lost := sorted(set(range(len(self.names))) - self.received.keys()):
            what = f"{self.names[lost[0]]}.{min(self.missing[lost[0]])} got no value while loading"
            raise ModelError(what, "this model is not supported; use another")
        self.store.settle(sink)
        layers = [self.received[number] for number in range(len(self.names))]
        room = self.place.shards * part_bytes(max(one.layout.nbytes for one in layers), self.place.shards)
        streamed = StreamedWeights(layers, self.store, self.device, room)
        streamed.put_into(self.model)
        if isinstance(self.store, ShardStore):
            self.store.serve(streamed.ring)
        if self.head:
            head = self.model.get_submodule(self.head)
            same = [name for name in self.tables if self.model.get_submodule(name).weight is head.weight]
            tied = self.model.get_submodule(same[0]) if same else None
            streamed.beside.append(head_streaming.put_in(head, tied, self.device, sink))
            setattr(head, _ON_HOST, True)
        if self.place.streams:
            say_streamed(streamed, self.device, sink)


def say_streamed(streamed: StreamedWeights, device: torch.device, sink: Sink) -> None:
    count, held, slots = len(streamed.layers), gib(streamed.total_bytes), gib(streamed.device_bytes)
    message = f"weights are streamed: {count} layers ({held}) through {slots}"
    if not hardware.is_card(device):
        message += "; without a GPU that is the same memory, and nothing is saved"
    sink.emit(Notice("memory", message, count))


def _store(place: Place, layers: int, device: torch.device) -> Keeper:
    if place.shards == 1:
        return HostStore(layers, device)
    gathers = gathering.of_run()
    assert gathers is not None, "nobody to share with"
    return ShardStore(layers, device, gathers)


def receive(causal_lm: Any, place: Place, device: torch.device, store: Keeper | None = None) -> Receiving:
    """Begin to load a model whose layers have their final form and no values. Raises ModelError where its layers
    cannot be streamed."""
    receiving = Receiving(causal_lm, place, device)
    if place.host_head and not lack_of(causal_lm):
        receiving.head = _host_head(causal_lm)
    if place.host_embedding:
        receiving.tables = frozenset(host_tables(causal_lm, receiving.head))
    if place.comes_and_goes:
        if lack := lack_of(causal_lm):
            key = "memory.shard_weights" if place.shards > 1 else "memory.stream_weights"
            raise ModelError(f"{key}: {type(causal_lm).__name__}: {lack}", f"set {key} = false, or use another base")
        layers = recomputable(causal_lm)
        full_names = {id(module): name for name, module in causal_lm.named_modules()}
        shared = {name for pair in causal_lm.all_tied_weights_keys.items() for name in pair}
        receiving.store = store or _store(place, len(layers), device)
        receiving.names = [full_names[id(layer)] for layer in layers]
        for name, layer in zip(receiving.names, layers, strict=True):
            own = [key for key, parameter in layer.named_parameters() if parameter.ndim > 1]
            own += [key for key, _ in stacks_of(layer)]
            receiving.wanted.append(frozenset(key for key in own if f"{name}.{key}" not in shared))
        receiving.missing = [set(wanted) for wanted in receiving.wanted]
    setattr(causal_lm, _KEPT, receiving)
    return receiving


def settled(model: Any, sink: Sink) -> Any:
    """The model, once nobody reads its tables as they were loaded: what is copied in pieces lies in them."""
    if (sender := head_streaming.inside(model)) is not None:
        sender.pin(sink)
    return model


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
    free = hardware.free_bytes(device) - _ROOM_BESIDE_BYTES
    return Place(streams=linear * of_linear + 2 * others + stacked > free, host_embedding=2 * others > free)


def device_of(model: Any) -> torch.device:
    """Where a model computes, whatever of it is elsewhere."""
    return device_of_head(model.get_output_embeddings())


def tables(model: Any) -> list[Tensor]:
    """Of a model's embeddings and its head, those on the host, each once."""
    found = [module.weight for module in model.modules() if vars(module).get(_ON_HOST)]
    return [*{id(table): table for table in found}.values()]


def give_head_back(model: Any) -> None:
    """The head on the device, as it is in other models: it is to be trained or replaced."""
    sender, streamed = head_streaming.inside(model), inside(model)
    if sender is None or streamed is None:
        return
    if (tied := sender.tied) is not None:
        tied.__class__ = type(tied).__mro__[1]  # as it was before `_on_host`
        for key, buffer in tied._buffers.items():
            tied._buffers[key] = buffer if buffer is None else buffer.to(sender.device)
    for module in (sender.head, tied):
        if module is not None:
            vars(module).pop(_ON_HOST)
    sender.give_back()
    streamed.beside.remove(sender)


def for_saved(model: Any, saved: Iterable[str]) -> None:
    """Before an adapter with these tensors is put on a model: a head that it replaces is on the device."""
    if any("lora_" not in name for name in saved):
        give_head_back(model)


def refuse_on_host(model: Any, name: str, modules: Collection[nn.Module]) -> None:
    """Raises ModelError where one of the modules that are to be trained whole as `name` is a table on the host. The
    head comes back from there."""
    if any(module is model.get_output_embeddings() for module in modules):
        give_head_back(model)
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


def move_to(matrix: Any, store: Keeper) -> None:
    """A matrix and its constants to the host, or a stack of them; small tables stay."""
    if isinstance(matrix, nn.Parameter):
        matrix.requires_grad_(False)
    for part, tensor in list(parts_of(matrix)):
        put_part(matrix, part, store.moved(tensor))


# --- embeddings -------------------------------------------------------------------------------------------------------


def host_tables(causal_lm: Any, head: str) -> Iterator[str]:
    """Names of the embeddings of ids whose table nothing else reads, but for a `head` that is on the host too."""
    main = causal_lm.get_input_embeddings()
    pairs = [{*pair} for pair in causal_lm.all_tied_weights_keys.items()]
    shared = {name for pair in pairs if f"{head}.weight" not in pair for name in pair}
    for name, module in causal_lm.named_modules():
        large = isinstance(module, nn.Embedding) and module.num_embeddings >= _ROWS_SHARE * main.weight.shape[0]
        if large and f"{name}.weight" not in shared:
            yield name


def _host_head(causal_lm: Any) -> str:
    """The name of a head that comes in blocks; "" where it stays: nothing is saved, or others than the embeddings have
    its table too."""
    head, main = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    names = {id(module): name for name, module in causal_lm.named_modules()}
    own, pair = f"{names[id(head)]}.weight", {f"{names[id(one)]}.weight" for one in (head, main)}
    tied = [{*one} for one in causal_lm.all_tied_weights_keys.items() if own in one]
    return names[id(head)] if head_streaming.saves(head) and all(one == pair for one in tied) else ""


def put_on_host(
    causal_lm: Any, tables: frozenset[str], device: torch.device, sink: Sink, with_head: bool = False
) -> None:
    """Have embeddings looked up on the host, and say what that saves."""
    saved = 0
    for name in sorted(tables):
        module = causal_lm.get_submodule(name)
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None or buffer.is_meta else buffer.cpu()
        if with_head:
            module.padding_idx = None  # whose row has no gradient, as no row has; not among those that are looked up
        module.__class__ = _on_host(type(module), device, causal_lm.get_output_embeddings() if with_head else None)
        setattr(module, _ON_HOST, True)
        saved += module.weight.nbytes
    message = f"embeddings are looked up on the host: {gib(saved)} less on the device"
    if not saved:
        message = 'memory.embedding = "host" saves nothing: the head multiplies by the same table, which stays'
    sink.emit(Notice("memory", message))


def _on_host(kind: Any, device: torch.device, head: Any) -> Any:
    """An embedding whose table and buffers are on the host, and whose rows are wanted on `device`. Once its table is
    cut into a head's blocks, rows are taken from those."""

    class OnHost(kind):  # type: ignore[misc]
        weight: nn.Parameter

        def forward(self, input_ids: Tensor) -> Tensor:
            if input_ids.is_meta:
                return torch.empty((*input_ids.shape, self.weight.shape[1]), dtype=self.weight.dtype, device=device)
            ids = host_ids(input_ids)
            if self.weight.is_meta:
                rows: Tensor = self._of_blocks(ids)
            else:
                rows = super().forward(ids)
            return hardware.pinned(rows, device).to(device, non_blocking=True)

        def _of_blocks(self, ids: Tensor) -> Tensor:
            """What the model's own class does with rows is done with those that are asked for, as a table."""
            sender, table = head_blocks.sender_of(head), self.weight
            assert isinstance(sender, head_streaming.StreamedHead)
            self.weight = nn.Parameter(sender.look_up(ids).flatten(0, -2), requires_grad=False)
            try:
                return super().forward(torch.arange(ids.numel()).view(ids.shape))  # type: ignore[no-any-return]
            finally:
                self.weight = table

    return called_as(kind, OnHost)
