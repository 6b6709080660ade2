"""Which linear layers a model calls, and which weights it reads by itself: only a layer that is called can change form.

A 4-bit layer and an adapter take the place of what `layer(x)` computes. Some models read `layer.weight` instead: in
Mamba's scan (`dt_proj.weight @ steps`), handed to a fused kernel, for its dtype, or clipped in place. In 4 bit such a
reading gets packed bytes, an error at best; beside an adapter it passes the adapter by. Both kinds of evidence count:

* the forward pass on meta tensors, watched: each layer, whether it was called, and whether its weight was read outside;
* the source of the model's classes: a fused kernel's branch is taken on a GPU alone, and never on meta.

A model whose forward pass cannot be computed on meta tensors is known by its source alone.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.errors import foreign_failures
from qlora.events import Notice
from qlora.model.config_filter import content_key
from qlora.model.reclassed import reclassed

_KEPT = "_linear_use"  # the attribute of a model that holds what is known of it
TOKENS = 8  # of the watched forward pass
# Methods that run before there are weights.
_NOT_FORWARD = ("__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights")
_OF_THE_PLACE = ("shape", "device")  # a 4-bit layer has them too; its dtype is that of its bytes
# peft's own list (peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba): it puts no adapter on these.
_REFUSED_BY_PEFT = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclass(frozen=True)
class LinearUse:
    """`kept`: names of linear layers that must stay as they are: read by the model itself, shared, or never called.

    `trunk`: why the trunk cannot be computed apart from the head; "" where it can.
    """

    kept: frozenset[str]
    trunk: str = ""


MOST_FOUND = 64  # configurations of one process; an entry has a few kilobytes
_FOUND: dict[tuple[Any, ...], LinearUse] = {}


def use_of(model: Any, layers: Mapping[str, nn.Module]) -> LinearUse:
    """What `model` does with its linear `layers`.

    Found once, best while the model is on meta, and kept with it: what loading, adapters, merges and the estimator take
    for a layer is the same. With weights in place, the source of its classes alone is asked.
    """
    known = getattr(model, _KEPT, None)
    if known is None:
        known = _find_once(model, layers)
        setattr(model, _KEPT, known)
    return known  # type: ignore[no-any-return]


def notices(model: Any) -> Iterator[Notice]:
    """What a reader of the recipe must know of a model's layers: which stay as they are, and none is recomputed."""
    known: LinearUse | None = getattr(model, _KEPT, None)
    if known and known.kept:
        kinds = Counter(next(part for part in reversed(name.split(".")) if not part.isdigit()) for name in known.kept)
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        message = f"layers whose weight the model reads or shares by itself stay in 16 bit, without adapters: {shown}"
        yield Notice("quantization", message, len(known.kept))
    if not model.supports_gradient_checkpointing:
        message = "transformers cannot recompute this model's layers: train.gradient_checkpointing has no effect"
        yield Notice("memory", message)


def _find_once(model: Any, layers: Mapping[str, nn.Module]) -> LinearUse:
    """On meta a run builds several models of one configuration, of which the same is found; none of them is kept."""
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    key = (type(model), content_key(model.config), on_meta, tuple(layers))
    if key not in _FOUND:
        if len(_FOUND) >= MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = _find(model, layers)
    return _FOUND[key]


def _find(model: Any, layers: Mapping[str, nn.Module]) -> LinearUse:
    kept = {name for name in layers if _reads(model, name)}
    # Zamba's blocks stand in several places: an adapter beside one of them would not be in the merged weight of all.
    shared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    kept |= {name for name in layers if f"{name}.weight" in shared}
    if model.config.model_type in _REFUSED_BY_PEFT:
        kept |= {name for name in layers if name.rpartition(".")[2] == "out_proj"}
    if model.base_model is model:
        return LinearUse(frozenset(kept), "it has no trunk apart from its head")
    watch = _watch(model, layers)
    if watch is None:
        return LinearUse(frozenset(kept))
    kept |= watch.read | (layers.keys() - watch.called)
    return LinearUse(frozenset(kept), "" if watch.hidden is not None else "its trunk returns no last_hidden_state")


def _reads(model: Any, name: str) -> bool:
    """Whether the source of a module around the layer names its weight."""
    owner, _, own = name.rpartition(".")
    while own.count(".") < 3:
        if own in _weights_read(type(model.get_submodule(owner))):  # type: ignore[arg-type]
            return True
        if not owner:
            return False
        owner, _, last = owner.rpartition(".")
        own = f"{last}.{own}"
    return False


@lru_cache(256)
def _weights_read(kind: Any) -> frozenset[str]:
    """Paths `a.b` of every `self.a.b.weight` in the methods of a class that transformers brings."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("transformers.models."):
            found |= _reads_of(Path(inspect.getfile(base))).get(base.__name__, set())
    return frozenset(found)


@lru_cache(64)
def _reads_of(file: Path) -> Mapping[str, set[str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: _reads_in(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _reads_in(kind: ast.ClassDef) -> set[str]:
    methods = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name not in _NOT_FORWARD]
    nodes = [node for method in methods for node in ast.walk(method)]
    # A slice of a weight belongs to tensor-parallel pretraining (BLOOM's `slow_but_exact`), which nobody asks for.
    harmless = {id(node.value) for node in nodes if isinstance(node, ast.Subscript)}
    harmless |= {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _OF_THE_PLACE}
    paths = (_path(node) for node in nodes if id(node) not in harmless)
    return {path.removesuffix(".weight") for path in paths if path.endswith(".weight")}


def _path(node: ast.AST) -> str:
    """`a.weight` for the expression `self.a.weight`; "" for what is none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""


# --- the watched forward pass -----------------------------------------------------------------------------------------


class _Watch:
    """What was seen of some layers: which were called, and whose weights were read while they were not."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = {id(layer): name for name, layer in layers.items()}
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.inside: list[int] = []
        self.hidden: Any = None  # what the trunk returned as its hidden states

    def class_of(self, kind: type) -> type:
        """A class that computes what `kind` does, and says so here."""
        watch = self

        class Watched(kind):  # type: ignore[misc, valid-type]
            def __getattr__(self, name: str) -> Any:
                if name == "weight" and id(self) not in watch.inside:
                    watch.read.add(watch.names[id(self)])
                return super().__getattr__(name)

            def __call__(self, *args: Any, **named: Any) -> Any:
                watch.called.add(watch.names[id(self)])
                watch.inside.append(id(self))
                try:
                    return super().__call__(*args, **named)
                finally:
                    watch.inside.pop()

        return Watched


def _watch(model: Any, layers: Mapping[str, nn.Module]) -> _Watch | None:
    """What was seen of a forward pass on meta; None where it cannot be computed."""
    if any(not parameter.is_meta for parameter in model.parameters()):
        return None
    watch = _Watch(layers)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    with (
        foreign_failures() as failure,
        reclassed(layers.values(), watch.class_of),
        _buffers_on_meta(model),
        torch.no_grad(),
        _Answering(),  # type: ignore[no-untyped-call]
    ):
        for training in (False, True):
            with _mode(model, training):
                model(input_ids=ids, use_cache=False)
        watch.hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    return None if failure.error else watch


class _Answering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what a forward pass asks the data of meta tensors: is this row one document, is this mask ones? Yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _buffers_on_meta(model: Any) -> Iterator[None]:
    """Buffers on meta for the time of the block; whatever a forward pass leaves in a module is taken out after it.

    Rotary positions are such: for a longer text a module gives itself other frequencies, and keeps them.
    """
    own = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    stored = [(module, set(module._non_persistent_buffers_set)) for module in model.modules()]
    try:
        for module, _, buffers in own:
            module._buffers.update({name: None if b is None else b.to("meta") for name, b in buffers.items()})
        yield
    finally:
        for module, attributes, buffers in own:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, names in stored:
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(names)


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
