"""Weights of a model that is loaded go to the host, when a GPU's memory has run out and nothing else is left to do.

The same tables and blobs as if the model had been loaded there (`weight_receiving.py`), and the same numbers: adapters
beside the layers stay. The head stays too, since its blocks would be another order of sums. A copy to the host takes
no memory of the device's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora import device as hardware
from qlora import numerics
from qlora.events import Sink
from qlora.model.layer_blobs import LayerWeights, matrices_of, parts_of, stacks_of
from qlora.model.weight_receiving import Place, host_tables, move_to, put_on_host, say_streamed, tables
from qlora.model.weight_stores import HostStore
from qlora.model.weight_streaming import StreamedWeights, inside, lack_of
from qlora.step.layerwise import recomputable

if TYPE_CHECKING:
    from qlora.recipe.sections import MemorySection

RAM_SHARE = 0.7  # of what is free, as for layers that are streamed from the start (`base_cache/layers_on_disk.py`)


def movable(model: Any, section: MemorySection, device: torch.device) -> Place:
    """What of a model may still go to the host: on a GPU, what the recipe leaves open, there is, and has room there."""
    if not hardware.is_card(device):
        return Place()
    run, layers = numerics.of_run(), recomputable(model)
    matrices = [one for layer in layers for _, one in (*matrices_of(layer), *stacks_of(layer))]
    held = sum(tensor.nbytes for matrix in matrices for _, tensor in parts_of(matrix))
    compiled = run is not None and bool(run.compiled)  # whose graphs have the weights where they were
    may_stream = not compiled and not lack_of(model) and held <= RAM_SHARE * hardware.available_ram()
    return Place(
        section.stream_weights == "auto" and inside(model) is None and may_stream,
        section.embedding == "auto" and not tables(model) and any(_untrained(model)),
    )


def move(model: Any, place: Place, device: torch.device, sink: Sink) -> None:
    """Have on the host what `place` says and is not there yet."""
    names = frozenset(_untrained(model) if place.host_embedding and not tables(model) else ())
    if names:
        for name in names:
            module = model.get_submodule(name)
            module.weight = nn.Parameter(module.weight.detach().cpu(), requires_grad=False)
        put_on_host(model, names, device, sink)
    if place.streams and inside(model) is None and not lack_of(model):
        _stream(model, device, sink)


def _untrained(model: Any) -> list[str]:
    """Embeddings that nothing is trained of, or beside."""
    if not isinstance(model.get_input_embeddings(), nn.Embedding):  # peft's wrapper around what is trained whole
        return []
    found = host_tables(model, "")
    return [name for name in found if not any(one.requires_grad for one in model.get_submodule(name).parameters())]


def _stream(model: Any, device: torch.device, sink: Sink) -> None:
    layers = recomputable(model)
    store, weights = HostStore(len(layers), device), list[LayerWeights]()
    shared = {id(model.get_parameter(name)) for pair in model.all_tied_weights_keys.items() for name in pair}
    for number, layer in enumerate(layers):
        kept = {name for name, parameter in layer.named_parameters() if id(parameter) in shared}
        one = LayerWeights(layer, kept=kept.__contains__)
        for name, matrix in (*matrices_of(layer), *stacks_of(layer)):
            if name not in kept:
                move_to(matrix, store)
        store.put(number, one)
        one.take_away(device)
        weights.append(one)
    store.settle(sink)
    streamed = StreamedWeights(weights, store, device)
    streamed.put_into(model)
    say_streamed(streamed, device, sink)
