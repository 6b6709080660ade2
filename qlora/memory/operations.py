"""What a step asks of a card, operation by operation: launches, bytes and arithmetic, seen while it runs on meta.

Equal operations are counted together, a layer's apart from the rest. So the whole model's follow from two short ones as
its bytes do: a layer more adds a layer's operations. What a card makes of them is `throughput.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

UP, UPDATE = "forward", "update"  # of a step's phases; what lies between them is the loss and the way down
# Of attention's arithmetic: two products of queries and keys' pairs forth, five back (Dao 2023, section 3).
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
# These read as many values as they give, not their whole table.
READ_WHAT_THEY_GIVE = ("aten::embedding", "aten::index_select", "aten::gather")
LAID_OUT_ONLY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view")
# torch's own: fused on compute capability 9.0 and 10.0, else a loop of products (pytorch#186620, #194227).
LOOPED_PRODUCT = "aten::_grouped_mm"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::linear")


class Operation(NamedTuple):
    """One launch: bytes that it reads and writes, operations of arithmetic, and whether it attends.

    Of a grouped product, of rows that are sorted by expert: how many `experts` and `rows`, and whether `loops`: a card
    without a grouped product of its own does it as one product an expert. Dequantizing what experts are multiplied by
    is an operation like any other, the same whatever the number of rows.
    """

    nbytes: int
    arithmetic: int
    attends: bool
    experts: int = 0
    rows: int = 0
    loops: bool = False


Operations = tuple[tuple[Operation, float], ...]  # each with how often


@dataclass(frozen=True)
class Layers:
    """`count` times the same layers: what they ask for in the forward pass, and in the backward pass with what is
    recomputed there."""

    count: float
    up: Operations
    down: Operations


@dataclass(frozen=True)
class Work:
    """Of a micro-batch and an update. `outside`: embedding, head and loss, forth and back. Of the update, whose few
    launches grow with the model in place of becoming more: launches, and bytes of all of them."""

    layers: tuple[Layers, ...]
    outside: Operations
    update: tuple[float, float]

    @property
    def micro_batch(self) -> Iterator[tuple[Operation, float]]:
        for group in self.layers:
            yield from ((operation, group.count * times) for operation, times in (*group.up, *group.down))
        yield from self.outside

    @property
    def launches(self) -> float:
        return sum(times for _, times in self.micro_batch)

    @property
    def nbytes(self) -> float:
        return sum(times * operation.nbytes for operation, times in self.micro_batch)

    @property
    def arithmetic(self) -> float:
        return sum(times * operation.arithmetic for operation, times in self.micro_batch)


@dataclass
class OperationCounter:
    """Sees each operation of one step. `documents` are the lengths of those of a micro-batch, over which attention is
    computed; windows in them are not counted (documents are seldom longer)."""

    documents: Sequence[int]
    seen: dict[str, Counter[Operation]] = field(default_factory=dict)

    def see(self, phase: str, func: Any, operands: tuple[Any, Mapping[str, Any]], result: Any) -> None:
        if (operation := self._operation(func, operands, result)) is not None:
            self.seen.setdefault(phase, Counter())[operation] += 1

    def _operation(self, func: Any, operands: tuple[Any, Mapping[str, Any]], result: Any) -> Operation | None:
        """None where no kernel is started: a view, or memory that nothing is written to."""
        name = func.name().partition(".")[0]
        if func.namespace == "prim" or name in LAID_OUT_ONLY or func.is_view:
            return None
        args, tensors = operands[0], [one for one in tree_leaves(operands) if isinstance(one, Tensor)]
        # By their places: the parts of a streamed layer's weights share a storage, and each of them is read.
        read = {(_storage(one), one.storage_offset()): one for one in tensors}
        storages = set(map(_storage, tensors))
        results = result if isinstance(result, (tuple, list)) else (result,)
        new = [one for one in results if isinstance(one, Tensor) and _storage(one) not in storages]
        new += [one for at, one in enumerate(args) if _is_written(func, at) for one in tree_leaves(one)]
        new = [one for one in new if isinstance(one, Tensor)]
        if not new:
            return None
        written = sum(map(_bytes, new))
        taken = written if name in READ_WHAT_THEY_GIVE else sum(map(_bytes, read.values()))
        attends = "attention" in name or "varlen_attn" in name
        if "grouped" in name:  # torch's, and those of `step/kernels`: rows (S, in) first
            arithmetic, loops = 2 * args[0].numel() * new[0].shape[-1], name == LOOPED_PRODUCT
            return Operation(taken + written, arithmetic, False, _experts_of(args), int(args[0].shape[0]), loops)
        return Operation(taken + written, self._attention(name, args) if attends else _product(name, args), attends)

    def _attention(self, name: str, args: Sequence[Any]) -> int:
        """Of causal attention over each document; with a mask the kernel computes the whole square."""
        back = "backward" in name
        query = args[1] if back else args[0]
        products = BACKWARD_PRODUCTS if back else FORWARD_PRODUCTS
        bias = args[4 if back else 3] if "efficient" in name else None
        if bias is not None:
            rows, heads, length, width = query.shape
            return 2 * products * int(rows * heads * length * length * width)
        laid_flat = "varlen" in name or "_efficient_attention" in name  # (…, tokens, heads, width)
        heads, width = (query.shape[-2 if laid_flat else 1], query.shape[-1])
        return products * sum(length * length for length in self.documents) * int(heads * width)

    def work(self) -> Work:
        """Of the model that was run, as one group of layers."""
        down = sum((seen for phase, seen in self.seen.items() if phase not in (UP, UPDATE)), Counter[Operation]())
        update = self.seen.get(UPDATE, Counter())
        moved = sum(operation.nbytes * count for operation, count in update.items())
        group = Layers(1, tuple(self.seen.get(UP, Counter()).items()), tuple(down.items()))
        return Work((group,), (), (update.total(), moved))


def of_whole_model(counted: Sequence[Work | None], sizes: Sequence[int], wanted: int) -> Work | None:
    """What a model of `wanted` layers asks for, by two of `sizes` layers, each seen as one group, or by itself."""
    short, long = counted[0], counted[-1]
    if short is None or long is None or len(sizes) == 1:
        return long
    more = sizes[1] - sizes[0]
    (one,), (other,) = short.layers, long.layers
    up, down = _less(other.up, one.up, 1), _less(other.down, one.down, 1)
    periods = sizes[1] / more
    outside = (*_less(other.up, up, periods), *_less(other.down, down, periods))
    launches, moved = (
        long_ + (long_ - short_) / more * (wanted - sizes[1])
        for short_, long_ in zip(short.update, long.update, strict=True)
    )
    return Work((Layers(wanted / more, up, down),), outside, (launches, moved))


def partly(kept: Work | None, recomputed: Work | None, share: float) -> Work | None:
    """Of a model of which so large a `share` of the layers is recomputed."""
    if kept is None or recomputed is None:
        return None
    (without,), (again,) = kept.layers, recomputed.layers
    groups = (replace(again, count=again.count * share), replace(without, count=without.count * (1 - share)))
    return replace(recomputed, layers=groups)


def _less(operations: Operations, taken: Operations, times: float) -> Operations:
    counts = dict(operations)
    for operation, count in taken:
        counts[operation] = counts.get(operation, 0) - times * count
    return tuple((operation, count) for operation, count in counts.items() if count)


def _is_written(func: Any, at: int) -> bool:
    declared = func._schema.arguments
    info = declared[at].alias_info if at < len(declared) else None
    return info is not None and bool(info.is_write)


def _product(name: str, args: Sequence[Any]) -> int:
    """Two operations for each value of the left operand and each column of the right one."""
    if name not in PRODUCTS:
        return 0
    left, right = args[1:3] if "addmm" in name or "baddbmm" in name else args[:2]
    return 2 * int(left.numel()) * int(right.shape[0 if name == "aten::linear" else -1])


def _experts_of(args: Sequence[Any]) -> int:
    """Of what a grouped product is given beside its rows: the second argument is (E, …), in whatever form."""
    return int(args[1].shape[0])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    """Of an expanded tensor what is there."""
    there = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(there) * tensor.element_size()
