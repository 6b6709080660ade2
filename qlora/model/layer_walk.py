"""A causal model computed layer by layer, its weights in memory only while their layer is computed.

All micro-batches pass a layer before the next layer's weights are fetched, so that each weight is fetched once (the
embedding and a tied head twice, a weight outside the layers twice), and memory is one layer, or embedding or head, and
the hidden states. accelerate's offloading hooks would fetch every weight again for every micro-batch.

The model's own forward is what runs. It is called twice with its layers replaced: first to learn what it hands to each
layer (masks, positions, rotary tables), then to do what comes after the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.batch import Batch


@dataclass(frozen=True)
class WeightHolder:
    """Gives parameters of `model` their weights for the time of a block: the one owner of where weights live.

    model   a causal language model, its parameters on `meta`
    names   all that `fetch` knows: parameters, and buffers whose values are stored
    fetch   from a name and the empty tensor in its place to the values, of any type, on any device
    device  where the weights are computed with, in `dtype`; what transformers keeps in fp32 stays so
    """

    model: Any
    names: Sequence[str]
    fetch: Callable[[str, Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """The weights `names`, of one layer say, are there for the time of the block."""
        taken: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name in names:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                place = module._buffers if leaf in module._buffers else module._parameters
                taken.append((place, leaf, place[leaf]))
                place[leaf] = self._fetched(name, place[leaf])
            yield
        finally:
            for place, leaf, empty in reversed(taken):  # a shared module is there under several names
                place[leaf] = empty

    def names_under(self, module: nn.Module) -> list[str]:
        """The names of a module's weights."""
        prefix = next(name for name, other in self.model.named_modules() if other is module)
        own = {f"{prefix}.{name}" for name in module.state_dict()}
        return [name for name in self.names if name in own]

    def _fetched(self, name: str, empty: Tensor) -> Tensor:
        values = self.fetch(name, empty)
        if not isinstance(empty, nn.Parameter):
            return values.to(self.device, empty.dtype)
        values = values.to(self.device, torch.float32 if stays_fp32(self.model, name, empty) else self.dtype)
        return nn.Parameter(values, requires_grad=False)


def stays_fp32(model: Any, name: str, empty: Tensor) -> bool:
    """Whether transformers keeps the parameter `name`, whose place `empty` has, in fp32 whatever the model's type.

    It has a list of whole parts of names; and a router may be made in fp32 (Hunyuan's, by its constructor).
    """
    kept = model._keep_in_fp32_modules_strict or ()
    listed = any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept)
    return listed or (empty.dtype == torch.float32 and re.search(r"\.(gate|router)\.", name) is not None)


@dataclass
class _Pass:
    """One micro-batch under way: its hidden states, and what the trunk hands to each layer beside them."""

    batch: Batch
    hidden_BSD: Tensor | None = None
    in_tuple: bool = False  # older models' layers give their hidden states as the first of a tuple
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def take(self, output: Any) -> None:
        """Keep a layer's output."""
        self.in_tuple = isinstance(output, tuple)
        self.hidden_BSD = output[0] if self.in_tuple else output

    def layer_output(self, *_: Any, **__: Any) -> Any:
        """The hidden states in the form that the trunk expects of a layer."""
        return (self.hidden_BSD,) if self.in_tuple else self.hidden_BSD


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The decoder layers of a causal language model. Raises LookupError where no list holds just them."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    raise LookupError(f"{type(model).__name__}: its {wanted} layers are not found")


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary tables and their like, which a model has beside its parameters."""
    for module in model.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})


def trained_hidden(hidden_BSD: Tensor, batch: Batch) -> Tensor:
    """The hidden states (T, D) of a micro-batch's trained positions."""
    return hidden_BSD.flatten(0, 1).index_select(0, batch.trained_T)


def trained_hidden_states(holder: WeightHolder, layers: Sequence[nn.Module], batches: Sequence[Batch]) -> Tensor:
    """The last hidden states (N, D) of the trained positions of all micro-batches, which are on the holder's device.

    Buffers are moved there. Raises what `holder.fetch` raises.
    """
    model, trunk = holder.model, holder.model.base_model
    move_buffers(model, holder.device)
    of_layer = [holder.names_under(layer) for layer in layers]
    embedding = {*holder.names_under(model.get_input_embeddings())}
    elsewhere = {*holder.names_under(model.get_output_embeddings())} - embedding
    outside = [name for name in holder.names if name not in elsewhere.union(*of_layer)]
    with holder.holding([*outside, *of_layer[0]]):
        passes = [_first_layer(trunk, layers, batch) for batch in batches]
    for number, layer in enumerate(layers[1:], start=1):
        with holder.holding(of_layer[number]):
            for one in passes:
                args, named = one.extras[number]
                one.take(layer(one.hidden_BSD, *args, **named))
                one.extras[number] = ((), {})  # masks are large, and no longer needed once every layer has them
    with holder.holding([name for name in outside if name not in embedding]):
        return torch.cat([trained_hidden(_after_layers(trunk, layers, one), one.batch) for one in passes])


def _first_layer(trunk: nn.Module, layers: Sequence[nn.Module], batch: Batch) -> _Pass:
    """Embeds a micro-batch and computes the first layer; of the others only what they are handed is kept."""
    one, first = _Pass(batch), layers[0].forward

    def compute(hidden_BSD: Tensor, *args: Any, **named: Any) -> Any:
        one.extras.append(((), {}))
        one.take(first(hidden_BSD, *args, **named))
        return one.layer_output()

    def remember(_: Tensor, *args: Any, **named: Any) -> Any:
        one.extras.append((args, named))
        return one.layer_output()

    _run(trunk, layers, [compute] + [remember] * (len(layers) - 1), batch, input_ids=batch.input_ids_BS)
    return one


def _after_layers(trunk: nn.Module, layers: Sequence[nn.Module], one: _Pass) -> Tensor:
    """What the trunk does after its last layer: at least a norm."""
    assert one.hidden_BSD is not None  # a copy: some models scale what they are given in its own place
    return _run(trunk, layers, [one.layer_output] * len(layers), one.batch, inputs_embeds=one.hidden_BSD.clone())


def _run(
    trunk: nn.Module, layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]], batch: Batch, **inputs: Any
) -> Tensor:
    """The trunk's last hidden states (B, S, D), with `forwards` in the place of its layers' own."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward  # type: ignore[method-assign]
        # As in step/forward.py: only so does transformers keep packed documents apart.
        output = trunk(**inputs, position_ids=batch.position_ids_BS, attention_mask=None, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
