"""What is true of an architecture before a weight is read: may rows share a pack, is its loss ours, has it layers?

Seen by running the model once on `meta` (see `tracing`) with two documents in one row, and never by its name alone:

* packing is safe where every module in which tokens meet is attention through the registered function, whose mask keeps
  the documents apart, and positions are those that were given. Recurrences, convolutions over time, attention in code
  of its own and positions counted by the place in the row are not; what a family does in spite of that is in the table
  `packing_table`, measured in fp32.
* the head is known where our logits are the very expression that the model's own `forward` computes.
* the trunk is computed layer by layer where the walk of `model.layer_walk` is the very expression of the plain trunk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.errors import ModelError, foreign_failures
from qlora.model import head_scaling
from qlora.model.config_filter import content_key, with_layers
from qlora.model.layer_walk import WeightHolder, layers_of, trained_hidden, trained_hidden_states
from qlora.model.meta_model import build_unmatched, choose_attention
from qlora.model.mixtures import experts_in
from qlora.model.packing_table import LARGEST_LEAK, LEAKS
from qlora.model.tracing import POSITIONS, TOKENS, Mixing, Trace, row_length
from qlora.step.forward import CausalParts, hidden_states

TRACED = "qlora_traced"
WINDOW = 4  # tokens; windows and chunks of attention are made this short, so that they show in short documents
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
FEW_LAYERS = 4
SHORTEST_ROW = 29  # two documents and padding, each longer than WINDOW


@dataclass(frozen=True)
class FamilyFacts:
    """What was seen of an architecture. A text is the reason why something is not the case, "" where it is.

    packing    why rows must not share a pack
    head       why our loss is not the model's own
    layerwise  why the trunk cannot be computed layer by layer
    mixing     classes of modules in which tokens meet, but for the registered attention
    """

    packing: str
    head: str
    layerwise: str
    mixing: tuple[str, ...] = ()


def facts_of(text: Any, name: str) -> FamilyFacts:
    """The facts of transformers' configuration `text` of a causal model, called `name` in messages.

    Raises ModelError where transformers cannot build the model.
    """
    return _facts(_Config(content_key(text), text, name))


def trainable_facts(text: Any, name: str) -> FamilyFacts:
    """The facts of a model that is to be trained. Raises ModelError where its loss would not be ours."""
    if unread := head_scaling.unread_key(text):
        raise ModelError(f"{name}: {unread}", head_scaling.HINT)
    facts = facts_of(text, name)
    if facts.head:
        raise ModelError(f"{name}: {facts.head}", head_scaling.HINT)
    return facts


@dataclass(frozen=True)
class _Config:
    """A configuration that is the same as another of the same text."""

    key: str
    text: Any = field(compare=False)
    name: str = field(compare=False)


@lru_cache(16)
def _facts(config: _Config) -> FamilyFacts:
    text = _short(config.text)
    for key in _WINDOWS:
        if isinstance(value := vars(text).get(key), int) and value > WINDOW:
            setattr(text, key, WINDOW)
    # One type for all: conversions are no part of what is compared.
    model = _built(text, config.name).eval().float().requires_grad_(False)
    seen = _Seen(model)
    with foreign_failures() as failure:
        seen.run_whole()
    if failure.error:
        unseen = f"{type(model).__name__} cannot be followed without weights ({failure.reason[:120]})"
        return FamilyFacts(_by_table(text, unseen), "", unseen)
    mixing = tuple(dict.fromkeys(one.kind for one in seen.mixings))
    packing = _by_table(text, seen.packing_reason())
    head = "" if seen.head_is_ours else head_scaling.reason(text)
    with foreign_failures() as failure:
        seen.run_layers()
    plain = not failure.error and seen.layers_are_trunk
    layerwise = "" if plain else f"{type(model).__name__}'s layers take more than what the layer before gives"
    return FamilyFacts(packing, head, layerwise, mixing)


def _built(text: Any, name: str) -> Any:
    """The model on meta, its attention traced; with attention of its own where its class knows no registered one."""
    try:
        with _tracing_attention():
            model = build_unmatched(copy.deepcopy(text), TRACED, name)
    except ModelError:
        model = build_unmatched(text, choose_attention(text, "auto", name), name)
    for _, module in experts_in(model):
        module.config._experts_implementation = TRACED
    return model


def _short(text: Any) -> Any:
    """A copy; where nothing in the configuration tells layers apart, of a few of them, which shows as much."""
    text = copy.deepcopy(text)
    for key, value in vars(text).items():
        tells = "layer" in key and "norm" not in key and key != "num_hidden_layers" and value not in (None, False, 0)
        same = isinstance(value, list) and len({str(item) for item in value}) == 1
        if tells and not same:
            return text
    return with_layers(text, min(FEW_LAYERS, int(text.num_hidden_layers)))


def _by_table(text: Any, reason: str) -> str:
    """The reason against packing, unless the family was measured and does not leak all the same."""
    leak = LEAKS.get(text.model_type)
    return "" if leak is not None and leak <= LARGEST_LEAK else reason


class _Seen:
    """One model under a trace: two documents and padding in one row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
        sizes |= {value for value in vars(model.config).values() if isinstance(value, int) and value > 0}
        length = row_length(sizes, SHORTEST_ROW)
        first = length // 2 - 2
        lengths = (first, length - first - 3, 3)
        self.batch = two_documents(lengths)
        self.starts = (0, first)
        self.trace = Trace(length)
        self.problems: list[str] = []
        self.attended = 0
        self.head_is_ours = self.layers_are_trunk = False
        self.mixings: tuple[Mixing, ...] = ()
        self._trunk_number = 0

    @contextmanager
    def _following(self) -> Iterator[None]:
        trace, batch = self.trace, self.batch
        with torch.no_grad(), _tracing_attention(self), trace.watching(self.model), trace:
            trace.name_weights(self.model)
            trace.name(batch.input_ids_BS, "ids", TOKENS)
            trace.name(batch.position_ids_BS, "positions", POSITIONS)
            yield

    def run_whole(self) -> None:
        """Our trunk, our head, and the model's own forward."""
        parts = CausalParts.of(self.model)
        named = {"position_ids": self.batch.position_ids_BS, "attention_mask": None, "use_cache": False}
        with self._following():
            hidden_BSD = hidden_states(parts, self.batch)
            self.mixings = tuple(self.trace.mixings)
            self._trunk_number = self.trace.number(torch.cat([trained_hidden(hidden_BSD, self.batch)]))
            kept = [hidden_BSD]  # a model whose forward goes around its trunk is compared by the whole expression
            handle = parts.trunk.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state))
            own = self.model(input_ids=self.batch.input_ids_BS, **named).logits
            handle.remove()
            ours = parts.head(kept[-1])
            if parts.transform is not None:
                ours = parts.transform(ours)
            self.head_is_ours = self.trace.number(ours) == self.trace.number(own)

    def run_layers(self) -> None:
        """The same hidden states, layer by layer."""
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        dtype = next(self.model.parameters()).dtype
        holder = WeightHolder(self.model, names, lambda _, empty: empty, torch.device("cpu"), dtype)
        with self._following():
            hidden_TD = trained_hidden_states(holder, layers_of(self.model), [self.batch])
            self.layers_are_trunk = self.trace.number(hidden_TD) == self._trunk_number

    def packing_reason(self) -> str:
        """Why rows must not share a pack of this model; "" where they may."""
        if self.mixings:
            first = self.mixings[0]
            return f"{first.kind} {first.what}"
        if self.problems:
            return self.problems[0]
        return "" if self.attended else "no attention of the registered kind was seen in it"

    def attend(self, module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor | None, settings: Any) -> Tensor:
        """In the place of attention: looks at the mask; the result (B, S, heads, D) stands for all that it sees."""
        self.attended += 1
        query, _, value = inputs
        kind = type(module).__name__
        if settings.get("position_bias") is not None:
            self.problems.append(f"{kind} adds a bias by distance")
        if mask is None or mask.is_meta:
            self.problems.append(f"{kind} gets no mask that keeps documents apart")
        else:
            self._judge_mask(kind, mask)
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        settings = sorted((key, one) for key, one in settings.items() if isinstance(one, (int, float, str)))
        with torch.utils._python_dispatch._disable_current_modes():
            output = torch.empty(shape, dtype=query.dtype, device="meta")
        seen = (*map(self.trace.number, inputs), *(() if mask is None else (self.trace.number(mask),)))
        self.trace.name(output, ("attention", *seen, *settings), TOKENS)
        return output

    def choose(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """In the place of experts, which compute each token by itself: (T, D) stands for all that they see."""
        with torch.utils._python_dispatch._disable_current_modes():
            output = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device="meta")
        seen = map(self.trace.number, (*inputs, *module.parameters(recurse=False)))
        self.trace.name(output, ("experts", *seen), TOKENS)
        return output

    def _judge_mask(self, kind: str, mask: Tensor) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            allowed_SS = (mask if mask.dtype == torch.bool else mask > -1).reshape(-1, *mask.shape[-2:])[0]
            documents_S = self.batch.document_ids_BS[0]
            same_SS = documents_S[:, None] == documents_S[None, :]
            if bool((allowed_SS & ~same_SS).any()):
                self.problems.append(f"{kind} lets documents of one pack see each other")
                return
            first, second = self.starts
            both = min(second - first, int((documents_S == 1).sum()))
            alone_SS, later_SS = (allowed_SS[at : at + both, at : at + both] for at in self.starts)
            if not torch.equal(alone_SS, later_SS):
                self.problems.append(f"{kind} attends by the place in the row")


def two_documents(lengths: tuple[int, ...]) -> Batch:
    """One row of documents of these lengths, all of its tokens trained."""
    positions_S = torch.cat([torch.arange(length) for length in lengths])
    documents_S = torch.cat([torch.full((length,), at) for at, length in enumerate(lengths)])
    ids_S = torch.arange(len(positions_S)) % 7 + 3
    ids_BS, positions_BS, documents_BS = (tensor.unsqueeze(0) for tensor in (ids_S, positions_S, documents_S))
    weights_BS = torch.ones(ids_BS.shape)
    return Batch(ids_BS, positions_BS, documents_BS, ids_BS, weights_BS, torch.arange(len(ids_S)))


@contextmanager
def _tracing_attention(seen: _Seen | None = None) -> Iterator[None]:
    """The name TRACED means attention that is looked at by `seen`, its masks made in full; and experts, as it says."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **settings: Any
    ) -> Any:
        assert seen is not None
        return seen.attend(module, (query, key, value), attention_mask, settings), None

    def full_mask(*args: Any, **named: Any) -> Any:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": "cpu"}
        return sdpa_mask(*args, **{**named, **skips})

    AttentionInterface.register(TRACED, attention)
    if seen is not None:
        ALL_EXPERTS_FUNCTIONS.register(TRACED, seen.choose)
    AttentionMaskInterface.register(TRACED, full_mask)
    yield
