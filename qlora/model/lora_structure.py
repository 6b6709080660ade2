"""Which linear layers take the same input, and which three make an MLP: seen from calls, never from a class's name.

The trunk is run once on a few tokens with every linear layer replaced by one that gives zeros, so that no weight is
read: it works the same on `meta`. A module that holds three adapted layers is called by itself with numbers in place of
their outputs, on the CPU, as it is trained and as it is asked: where what it hands to the third is silu(first) * second
to the bit, and what it returns is what the third gave, that is all it computes. The numbers go up to thousands: some
models cap them, at 7 or 16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from qlora.batch import Batch
from qlora.errors import foreign_failures
from qlora.model.mixtures import experts_in
from qlora.model.reclassed import reclassed
from qlora.model.weight_receiving import device_of
from qlora.model.weight_streaming import inside
from qlora.step.experts import skipping
from qlora.step.forward import CausalParts, evaluating, hidden_states
from qlora.step.layerwise import recomputable

TOKENS = 8  # of the watched pass
SPREADS = (1.0, 30.0, 1e3)  # of numbers that an MLP is tried on


@dataclass(frozen=True)
class Gated:
    """A module that computes down(silu(gate(x)) * up(x)), and what it calls these three layers."""

    module: nn.Module
    layers: tuple[str, str, str]


@dataclass(frozen=True)
class Sharing:
    """A module whose own layers of these names are given the same input, one after the other."""

    module: nn.Module
    layers: tuple[str, ...]


def gated_of(adapted: Mapping[str, nn.Module], model: nn.Module) -> list[Gated]:
    """Every MLP of `model` whose three layers are all `adapted` (modules by their full names)."""
    found = []
    for owner, names in _by_owner(adapted).items():
        module = model.get_submodule(owner)
        of_layers = sum(len(list(adapted[f"{owner}.{name}"].parameters())) for name in names if owner)
        if len(names) == 3 and owner and of_layers == len(list(module.parameters())):
            with foreign_failures(trial=True) as failure:
                order = _order(module, names)
            if not failure.error and order is not None:
                found.append(Gated(module, order))
    return found


def sharing_of(adapted: Mapping[str, nn.Module], causal_lm: Any) -> list[Sharing]:
    """Layers of one module that were given the very same tensor; none where the trunk cannot be run like this.

    `adapted` are modules of `causal_lm` by their full names.
    """
    names = {id(module): name for name, module in adapted.items()}
    linears = [one for one in causal_lm.modules() if isinstance(one, nn.Linear) or id(one) in names]
    experts = [module for _, module in experts_in(causal_lm)]
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    counts: dict[int, int] = defaultdict(int)
    with _watched() as watched:
        with (
            foreign_failures(trial=True) as failure,
            evaluating(causal_lm),
            skipping(experts),
            reclassed(linears, watched.class_of),
        ):
            hidden_states(CausalParts.of(causal_lm), _few_tokens(causal_lm))
        if failure.error:
            return []
        for layer, inputs in watched.calls:
            counts[id(layer)] += 1
            if id(layer) in names:
                owner, _, name = names[id(layer)].rpartition(".")
                groups[owner, id(inputs)].append(name)
    return [
        Sharing(causal_lm.get_submodule(owner), tuple(members))
        for (owner, _), members in groups.items()
        if len(set(members)) > 1 and all(counts[id(causal_lm.get_submodule(f"{owner}.{one}"))] == 1 for one in members)
    ]


def unread_of(gated: Sequence[Gated], causal_lm: Any) -> set[int]:
    """MLPs, by identity, whose outputs their layers only add to their own: to go back through such a layer, nobody
    needs the values. Seen in autograd's graph of a pass with nothing but marks in the place of MLPs."""
    added: set[int] = set()
    read: set[int] = set()

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        own = {id(one) for one in layer.modules()}
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.grad_fn is not None:
                plainly, otherwise = _marks_below(one.grad_fn)
                added.update(plainly & own)
                read.update(otherwise)

    linears = [one for one in causal_lm.modules() if isinstance(one, nn.Linear)]
    with ExitStack() as stack:
        failure = stack.enter_context(foreign_failures(trial=True))
        stack.enter_context(evaluating(causal_lm))
        stack.enter_context(torch.enable_grad())
        if (streamed := inside(causal_lm)) is not None:
            stack.enter_context(streamed.looked_at())
        watched = stack.enter_context(_watched())
        stack.enter_context(reclassed(linears, watched.class_of))
        stack.enter_context(reclassed([one.module for one in gated], _marked))
        for layer in recomputable(causal_lm):
            stack.callback(layer.register_forward_pre_hook(_apart).remove)
            stack.callback(layer.register_forward_hook(look).remove)
        hidden_states(CausalParts.of(causal_lm), _few_tokens(causal_lm))
    return set() if failure.error else added - read


# Of autograd's functions: what is computed there needs none of its inputs' values to go back.
_VALUELESS = ("AddBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0")


def _marks_below(node: Any) -> tuple[set[int], set[int]]:
    """Marks that a graph goes down to through nothing but such functions, and marks that it goes down to otherwise."""
    plainly: set[int] = set()
    otherwise: set[int] = set()
    waiting, seen = [(node, True)], set()
    while waiting:
        node, plain = waiting.pop()
        if (node, plain) in seen:
            continue
        seen.add((node, plain))
        owner = getattr(node, "owner", None)
        if owner is not None:
            (plainly if plain else otherwise).add(owner)
            continue
        scaled = node.name() == "MulBackward0" and node._saved_self is None  # times a constant
        plain = plain and (scaled or node.name() in _VALUELESS)
        waiting += [(below, plain) for below, _ in node.next_functions if below is not None]
    return plainly, otherwise


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, owner: int) -> Tensor:
        ctx.owner = owner
        return torch.zeros_like(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _marked(kind: type) -> type:
    class Marked(kind):  # type: ignore[misc, valid-type]
        def forward(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            return _Mark.apply(inputs, id(self))  # type: ignore[no-any-return, no-untyped-call]

    return Marked


def _apart(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's own graph: it ends at the hidden states that it is given."""
    hidden_BSD, *rest = inputs
    return (hidden_BSD.detach().requires_grad_(), *rest)


def _few_tokens(causal_lm: Any) -> Batch:
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device_of(causal_lm))
    positions = torch.arange(TOKENS, device=ids.device)[None]
    starts = torch.tensor([0, TOKENS], dtype=torch.int32).to(ids.device)
    return Batch(ids, positions, ids, ids, ids.float(), ids[0], starts, (TOKENS,), single=True)


@dataclass
class _Watched:
    """Calls of layers in their order, with their inputs; `answers` are what some of them give, by identity."""

    calls: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    answers: dict[int, Tensor] = field(default_factory=dict)

    def call(self, layer: Any, inputs: Tensor) -> Tensor:
        self.calls.append((layer, inputs))
        known = self.answers.get(id(layer))
        return inputs.new_zeros(*inputs.shape[:-1], layer.out_features) if known is None else known

    def class_of(self, kind: type) -> type:
        """A class that computes nothing, and says so here."""
        watched = self

        class Replaced(kind):  # type: ignore[misc, valid-type]
            def __call__(self, inputs: Tensor, *_: Any, **__: Any) -> Tensor:
                return watched.call(self, inputs)

        return Replaced


@contextmanager
def _watched(answers: dict[int, Tensor] | None = None) -> Iterator[_Watched]:
    """Calls that are known inside the block alone: its classes live until Python looks for cycles, and would hold every
    input, on a GPU too, with its graph."""
    watched = _Watched(answers=answers or {})
    try:
        yield watched
    finally:
        watched.calls.clear()
        watched.answers.clear()


def _by_owner(adapted: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = defaultdict(list)
    for name in adapted:
        owner, _, own = name.rpartition(".")
        owners[owner].append(own)
    return owners


def _order(module: nn.Module, names: Sequence[str]) -> tuple[str, str, str] | None:
    """Which of a module's layers are gate, up and down; None where it computes anything else."""
    layers = [getattr(module, name) for name in names]
    generator = torch.Generator().manual_seed(0)
    found = set()
    for training in (False, True):  # dropout is there in the second
        inputs, *answers = (
            torch.cat([spread * torch.randn(2, 8, 32, generator=generator) for spread in SPREADS]) for _ in range(4)
        )
        with evaluating(module):
            module.train(training)
            found.add(_order_by(module, layers, inputs, answers))
    order = found.pop() if len(found) == 1 else None
    return order and (names[order[0]], names[order[1]], names[order[2]])


def _order_by(
    module: nn.Module, layers: Sequence[nn.Module], inputs: Tensor, answers: Sequence[Tensor]
) -> tuple[int, int, int] | None:
    known = {id(layer): answer for layer, answer in zip(layers, answers, strict=True)}
    with _watched(known) as watched:
        with reclassed(layers, watched.class_of):
            output = type(module).forward(module, inputs)
        calls, count = {id(layer): given for layer, given in watched.calls}, len(watched.calls)
    if count != 3 or len(calls) != 3 or not isinstance(output, Tensor):
        return None
    for gate, up, down in permutations(range(3)):
        first, second, last = (calls[id(layers[at])] for at in (gate, up, down))
        expected = silu(answers[gate]) * answers[up]
        if first is inputs and second is inputs and torch.equal(last, expected) and torch.equal(output, answers[down]):
            return gate, up, down
    return None
