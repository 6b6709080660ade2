"""What runs a decoder layer of a model that is trained, with a begin and an end in the forward and the backward pass.

A layer that is recomputed keeps nothing of its forward pass but the hidden states that it was given; its backward pass
computes it once more, and goes back through that at once. Between begin and end the layer is whole; behind it, nobody
needs its inner tensors. transformers asks us for each layer (`_gradient_checkpointing_func`), so that its own forward
is what runs, hooks and adapters included.

The lowest layers are the ones to recompute where not all are: in the backward pass the layers above them have given
their tensors back when the first layer is computed anew. The other way round, that layer's tensors would come on top of
all that is kept (tests/memory/test_recomputing.py has the difference).

Its weights and its input may be elsewhere in between: that is up to two partners (`layer_partners.py`). Whoever holds
weights somewhere else sees each forward pass by itself, trained or not; of a backward pass it is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from qlora.layer_partners import ON_DEVICE, RESIDENT, Inputs, Weights, is_closed, module_of, number_of, weights_of
from qlora.random_state import RandomState
from qlora.step.lora_linear import recomputing
from qlora.step.offload import kept_by


def set_gradient_checkpointing(
    causal_lm: Any, layers: bool | int, keep_random_state: bool, inputs: Inputs = ON_DEVICE
) -> None:
    """Recompute the first `layers` layers in the backward pass; True is all of them, False none.

    `keep_random_state` is needed where a layer draws random numbers (LoRA dropout), so that the second pass draws the
    same ones. `inputs` holds those of recomputed layers. A model whose layers transformers cannot recompute stays as
    it is.
    """
    if not causal_lm.supports_gradient_checkpointing:
        return
    numbers = {id(layer): number for number, layer in enumerate(recomputable(causal_lm))}
    run = _Recomputed(keep_random_state, weights_of(causal_lm), inputs, numbers)
    causal_lm._set_gradient_checkpointing(enable=layers is not False, gradient_checkpointing_func=run)
    if not isinstance(layers, bool):
        for number, layer in enumerate(recomputable(causal_lm)):
            layer.gradient_checkpointing = number < layers


def recomputable(causal_lm: Any) -> list[Any]:
    """The layers that ask for `_gradient_checkpointing_func`, from the first to the last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass(frozen=True)
class _Recomputed:
    """Runs a layer: `layer` is its forward with its named inputs, `inputs` what transformers hands it by position."""

    keep_random_state: bool
    weights: Weights = RESIDENT
    inputs: Inputs = ON_DEVICE
    numbers: Mapping[int, int] = field(default_factory=dict)  # of layers, by their identity

    def __call__(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        module = module_of(layer)
        number = number_of(module, self.numbers, self.weights)
        if not inputs or not is_closed(layer, inputs):
            # What other layers read or gradients flow to is more than hidden states: Gemma 3n and 4 share keys and
            # values through a dict. torch follows that, by recomputing within one graph.
            with kept_by(self.inputs, number, inputs):
                return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=self.keep_random_state)
        hidden_BSD, *rest = inputs
        parameters = module.parameters() if module is not None else ()
        if not (hidden_BSD.requires_grad or any(parameter.requires_grad for parameter in parameters)):
            return layer(*inputs)  # nothing below is trained: nobody goes back to it
        # An output has a gradient where an input has one, which the first layer's hidden states have not.
        anchor = torch.empty(0, requires_grad=True)
        state = RandomState.of(hidden_BSD.device) if self.keep_random_state else None
        return RunLayer.apply(hidden_BSD, anchor, lambda hidden: layer(hidden, *rest), state, self, number)  # type: ignore[no-untyped-call]


class RunLayer(torch.autograd.Function):
    """A layer without a graph, and with one when it is gone back through. Gradients of its parameters are accumulated
    where they are: in the backward pass of the second computation, inside this one's."""

    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, anchor: Tensor, layer: Callable[[Tensor], Any], *about: Any) -> Any:
        ctx.state, ctx.partners, ctx.number = about
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.goes_below = layer, hidden_BSD.requires_grad
        ctx.ticket = ctx.partners.inputs.keep(ctx.number, hidden_BSD)
        return layer(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        number, weights = ctx.number, ctx.partners.weights
        try:
            weights.use(number, number - 1 if number else None)
            return RunLayer._go_back(ctx, gradients), *[None] * 5
        finally:
            weights.release(number)

    @staticmethod
    def _go_back(ctx: Any, gradients: tuple[Tensor | None, ...]) -> Tensor | None:
        ticket, ctx.ticket = ctx.ticket, None  # given up as the pass goes: a graph lives until its last node is done
        hidden_BSD = ctx.partners.inputs.give(ticket).detach().requires_grad_(ctx.goes_below)
        with torch.enable_grad(), recomputing(), ctx.state.drawing_again() if ctx.state else nullcontext():
            output = ctx.layer(hidden_BSD)
        outputs = output if isinstance(output, tuple) else (output,)
        asked = [one is not None and value.requires_grad for one, value in zip(gradients, outputs, strict=True)]
        # By their place in the graph: their values are of no more use, and would take the room of one layer's output.
        edges = [get_gradient_edge(value) for value, wanted in zip(outputs, asked, strict=True) if wanted]
        del output, outputs
        torch.autograd.backward(edges, [one for one, wanted in zip(gradients, asked, strict=True) if wanted])
        return hidden_BSD.grad  # type: ignore[no-any-return]
