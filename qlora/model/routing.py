"""Where a mixture's tokens go: how many experts are hit, how much the largest takes, and what tuning has changed.

The router is frozen, but what it is given is not: adapters below it move hidden states, and a token may go to other
experts than the untuned base sends it to. A run that collapses onto a few experts would show here. One micro-batch goes
through the trunk twice, with the adapters off and on; counted are its trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.events import Routed
from qlora.model.mixtures import experts_in
from qlora.step.forward import CausalParts, hidden_states


class LayerRouting(NamedTuple):
    """Of one layer. Shares of 0 to 1.

    hit      of its experts, those that any token went to
    largest  of all choices, the most frequent expert's
    changed  of the tokens, those that go to another set of experts than without the adapters
    """

    hit: float
    largest: float
    changed: float


def compared(model: Any, parts: CausalParts, first: Callable[[], Batch]) -> list[LayerRouting]:
    """Each layer with experts of a tuned model, in order; none of a dense one. The caller sees to evaluation mode.

    `first` gives the micro-batch, on the model's device.
    """
    modules = [module for _, module in experts_in(model.get_base_model())]
    if not modules:
        return []
    batch = first()
    with model.disable_adapter():
        before = _choices(modules, parts, batch)
    after, counts = _choices(modules, parts, batch), [int(module.num_experts) for module in modules]
    return [_of_layer(*of_layer) for of_layer in zip(before, after, counts, strict=True)]


def event(step: int, layers: Sequence[LayerRouting]) -> Routed:
    """What a run reports of it."""
    hit, largest, changed = (tuple(round(share, 4) for share in shares) for shares in zip(*layers, strict=True))
    return Routed(step, hit, largest, changed)


def _choices(modules: Sequence[Any], parts: CausalParts, batch: Batch) -> list[Tensor]:
    """The experts of the trained tokens in each layer, (T, K), each token's in rising order."""
    found: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        chosen_TK = inputs[1].reshape(-1, inputs[1].shape[-1]).index_select(0, batch.trained_T)
        found.append(chosen_TK.sort(dim=1).values)

    with torch.no_grad(), ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        hidden_states(parts, batch)
    return found


def _of_layer(before_TK: Tensor, after_TK: Tensor, experts: int) -> LayerRouting:
    counts = torch.bincount(after_TK.reshape(-1), minlength=experts)
    changed = (before_TK != after_TK).any(dim=1).float().mean()
    return LayerRouting(
        float((counts > 0).float().mean()), float(counts.max() / counts.sum().clamp(min=1)), float(changed)
    )
