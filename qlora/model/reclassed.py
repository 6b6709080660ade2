"""Modules of another class, for a time or for good: what they compute is another thing then, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def reclassed(modules: Iterable[nn.Module], class_of: Callable[[type], type]) -> Iterator[None]:
    """Each of the modules is of the class that `class_of` gives for its own, for the time of the block."""
    own = [(module, type(module)) for module in modules]
    kinds = {kind: class_of(kind) for kind in {kind for _, kind in own}}
    try:
        for module, kind in own:
            module.__class__ = kinds[kind]
        yield
    finally:
        for module, kind in own:
            module.__class__ = kind


def called_as(kind: Any, own: Any) -> Any:
    """`own` under the name of `kind`, its base: libraries know some classes by their names."""
    own.__name__, own.__qualname__, own.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return own
