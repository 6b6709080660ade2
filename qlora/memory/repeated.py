"""Operations on meta tensors that were asked before are answered from what they gave then.

What a meta operation gives follows from shapes, strides, types and plain arguments alone. A model asks the same few
hundred of them in every layer, and torch works most of them out in Python, 100 µs each: of one simulated run 85 % are
repetitions, which take a tenth of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# They write into their first operand and give it back. On meta that is nothing but checks, which torch makes in Python:
# half a millisecond and more for each product that is added to another, in all a sixth to a quarter of a simulation.
IN_PLACE = frozenset({torch.ops.aten.addmm_.default, torch.ops.aten.uniform_.default})
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _New(NamedTuple):
    """A tensor with a storage of its own, which nothing lies in but itself."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        empty: Tensor = torch.ops.aten.empty_strided.default(self.shape, self.stride, dtype=self.dtype, device="meta")
        return empty


class RepeatedOperations:
    """Answers of meta operations; whatever is no function of shapes and types alone is asked each time."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[_New, ...] | _New | None] = {}
        self._checked: set[Any] = set()

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `func` gives, in tensors of its own as ever."""
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if func in IN_PLACE:
            if key not in self._checked:
                func(*args, **kwargs)
                self._checked.add(key)
            return args[0]
        if (known := self._known.get(key)) is not None:
            return known.made() if isinstance(known, _New) else tuple(one.made() for one in known)
        result = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _answer(result, args)
        return result


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the answer follows from; None where something else may count, or `func` may change what it is given."""
    if func._schema.is_mutable and func not in IN_PLACE:
        return None
    parts = [_part(value) for value in args]
    named = [(name, _part(value)) for name, value in kwargs.items()]
    if None in parts or any(part is None for _, part in named):
        return None
    return (func, *parts, *named)


def _part(value: Any) -> Any:
    """Of one argument; None for what is neither a meta tensor nor plain."""
    if isinstance(value, Tensor):
        if value.device.type != "meta" or value.layout != torch.strided:
            return None
        return (Tensor, value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_part, value))
        return None if None in parts else parts
    return (type(value), value) if isinstance(value, PLAIN) else None  # 1, 1.0 and True are equal, and not the same


def _answer(result: Any, args: Sequence[Any]) -> tuple[_New, ...] | _New | None:
    """What is to be given next time: None for views, for several results in one storage, and for what is no tensor."""
    results = result if isinstance(result, tuple) else (result,)
    given = {id(one.untyped_storage()) for one in _tensors(args)}
    found = [_new(one, given) if isinstance(one, Tensor) else None for one in results]
    if any(one is None for one in found) or len({id(one.untyped_storage()) for one in results}) < len(results):
        return None
    return tuple(filter(None, found)) if isinstance(result, tuple) else found[0]


def _new(tensor: Tensor, given: set[int]) -> _New | None:
    storage = tensor.untyped_storage()
    of_its_own = _New(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    plain = tensor.layout == torch.strided and tensor.device.type == "meta" and type(tensor) is Tensor
    alike = plain and tensor.storage_offset() == 0 and of_its_own.made().untyped_storage().nbytes() == storage.nbytes()
    return of_its_own if alike and id(storage) not in given else None


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
