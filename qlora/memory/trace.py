"""Counts the bytes that are live while code runs, on meta tensors or on real ones, as a GPU's allocator would.

A dispatch mode sees every operation; each new storage is a request to the replayed allocator, and is given back when
the storage dies. What an operation takes inside itself is invisible to a mode and stands in `SCRATCH`. The total is
kept by category, and its peak by phase of the run, so that phases can be extended apart (see `simulate.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.memory.allocator import Block, CachingAllocator, rounded
from qlora.memory.operations import OperationCounter
from qlora.memory.repeated import RepeatedOperations
from qlora.memory.tape import Tape
from qlora.model.nf4 import product_4bit
from qlora.step.kernels import operators

aten = torch.ops.aten

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")
HOST = "host"  # what is made in this region is no memory of the device's


@dataclass(frozen=True)
class Peak:
    """The largest total of a phase: bytes by category at that moment, each storage rounded to 512.

    `slack` is what the allocator counts on top at that moment, because it hands out some blocks larger than asked for;
    `reserved` the most that it had taken from the driver.
    """

    parts: Mapping[str, int]
    slack: int
    reserved: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def most_multiprocessors(gigabytes: int) -> int:
    """Of NVIDIA's cards of up to so much memory, the largest (RTX 3070 Ti, RTX 3080 Ti, RTX 5080, RTX PRO 6000)."""
    return next((count for size, count in ((8, 48), (12, 80), (16, 84)) if gigabytes <= size), 188)


@dataclass(frozen=True)
class Sums:
    """How attention's backward pass sums the gradient of its queries, over a micro-batch of `rows`.

    In one order only, on a card of `multiprocessors`, each of them that would share a head's sum has a copy of its own
    (flash_attn/flash_api.cpp, nsplits). 0: in any order, into one.
    """

    rows: int = 1
    multiprocessors: int = 0

    def copies(self, heads: int) -> int:
        """Copies that are summed at the end, for so many heads of all documents."""
        return max(1, -(-self.multiprocessors // heads))


# Of one simulated run, at 30 to 150 µs each: 4 layers and 256 chunks of the head take 20,000, linear attention in
# chunks 184,000 at 8,192 tokens (Qwen3.6-35B-A3B without its kernel), and a model that computes its tokens one by one
# (RWKV without its kernel) would take minutes.
MOST_OPERATIONS = 300_000


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. `packed` is the answer to the model's question whether a row has several documents.

    `target` ("cuda" or "cpu") is the device that meta tensors stand for: it decides about the scratch of kernels.
    `gradient_shapes` and `vocabulary` tell gradients and logits from activations.
    """

    def __init__(self, target: str, packed: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.target = target
        self.packed = packed
        self.sums = Sums()
        self.gradient_shapes: set[tuple[int, ...]] = set()
        self.vocabulary = 0
        self.allocator = CachingAllocator()
        self.tape: Tape | None = None
        self.counter: OperationCounter | None = None
        self.repeated = RepeatedOperations()
        self.peaks: dict[str, Peak] = {}
        self._now = dict.fromkeys(CATEGORIES, 0)
        self._known: dict[int, weakref.ref[Any]] = {}
        self._blocks: dict[int, Block] = {}
        self._region: str | None = None
        self._phase = ""
        self._total = 0
        self._highest = -1
        self._operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch wraps a mode's method for its compiler at half of what an operation takes; none runs inside."""
        return False

    # --- for the caller ------------------------------------------------------------------------------------------

    @contextmanager
    def region(self, category: str) -> Iterator[None]:
        """Whatever is made inside belongs to `category`."""
        before, self._region = self._region, category
        try:
            yield
        finally:
            self._region = before

    def begin(self, phase: str) -> None:
        """From now on the peak is that of `phase`; what is live already counts."""
        self._phase, self._highest = phase, -1
        self._record()

    def renew(self) -> None:
        """Give the allocator no past: what is live is laid out anew, so that every run counts as the first one."""
        self._operations = 0
        self.allocator = CachingAllocator()
        laid_out = {key: self.allocator.allocate(block.wanted) for key, block in self._blocks.items()}
        self._blocks = {key: block for key, block in laid_out.items() if block is not None}

    def record(self, before: Sequence[int] = ()) -> Tape:
        """From now on requests and releases are written down, after the sizes of what lives and lived before."""
        self.tape = Tape(before, [block.wanted for block in self._blocks.values()])
        return self.tape

    @property
    def phase(self) -> str:
        return self._phase

    @property
    def live(self) -> Mapping[str, int]:
        return dict(self._now)

    # --- what it sees --------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise RuntimeError(f"more than {MOST_OPERATIONS:,} operations: it takes its tokens one by one")
        if func.namespace == "bitsandbytes":
            if func.name() == "bitsandbytes::gemm_4bit":
                with self:  # bitsandbytes' fused kernel for few rows (backends/cuda/ops.py) takes less
                    return product_4bit(*args, **kwargs, dtype=args[0].dtype)
            if "optimizer_update" in func.name() and any(isinstance(a, Tensor) and a.is_meta for a in args):
                self._count(func, (args, kwargs), None)
                return None  # works in place, and knows no meta tensors
        elif func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer(args[0])
        result = self.repeated.call(func, args, kwargs)
        self._count(func, (args, kwargs), result)
        workspace = "workspace" if func.namespace == "bitsandbytes" and "dequantize" in func.name() else None
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.adopt(value, self._region or workspace or self._category(value))
        scratch = (SCRATCH if self.target == "cuda" else SCRATCH_IN_TORCH).get(func.name())
        if scratch is not None:
            self._use_for_a_moment(scratch(self.sums, *args, **kwargs))
        return result

    def _count(self, func: Any, operands: tuple[Any, Mapping[str, Any]], result: Any) -> None:
        if self.counter is not None:
            self.counter.see(self._phase, func, operands, result)

    def _answer(self, asked: Tensor) -> Any:
        """A model's forward asks its data one thing: is this row a single document? (transformers.masking_utils)"""
        if asked.dtype == torch.bool:
            return not self.packed
        return 1.0 if asked.dtype.is_floating_point else 1

    def _category(self, tensor: Tensor) -> str:
        if tuple(tensor.shape) in self.gradient_shapes:
            return "gradients"
        return "logits" if tensor.ndim >= 2 and tensor.shape[-1] == self.vocabulary else "activations"

    def adopt(self, tensor: Tensor, category: str) -> None:
        """Count a tensor, from now until its storage dies."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        if category == HOST:
            self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None))
            return
        taken = rounded(storage.nbytes())
        block = self.allocator.allocate(taken)
        if block is None:
            return

        def died(_: Any) -> None:
            del self._known[key]
            self._add(category, -taken)
            if self.tape is not None:
                self.tape.give(key)
            self.allocator.release(self._blocks.pop(key))

        self._known[key] = weakref.ref(storage, died)
        self._blocks[key] = block
        if self.tape is not None:
            self.tape.take(key, taken)
        self._add(category, taken)
        self._record()

    def _add(self, category: str, count: int) -> None:
        self._now[category] += count
        self._total += count

    def _use_for_a_moment(self, sizes: tuple[int, ...]) -> None:
        blocks = [block for size in sizes if (block := self.allocator.allocate(size)) is not None]
        taken = sum(map(rounded, sizes))
        if self.tape is not None:
            for at, size in enumerate(filter(None, sizes)):
                self.tape.take(-at - 1, rounded(size))
            for at in range(len(sizes)):
                self.tape.give(-at - 1)
        self._add("workspace", taken)
        self._record()
        self._add("workspace", -taken)
        for block in blocks:
            self.allocator.release(block)

    def _record(self) -> None:
        if self._total > self._highest:
            self._highest = self._total
            slack = self.allocator.allocated - self._total
            self.peaks[self._phase] = Peak(dict(self._now), slack, self.allocator.reserved)
        elif self.allocator.reserved > self.peaks[self._phase].reserved:
            self.peaks[self._phase] = replace(self.peaks[self._phase], reserved=self.allocator.reserved)


def _efficient_backward(_sums: Sums, _grad: Tensor, query: Tensor, *_rest: Any, **_settings: Any) -> tuple[int, ...]:
    """aten/src/ATen/native/transformers/cuda/attention_backward.cu: delta, and a float32 accumulator for dQ, whose rows
    and columns are aligned to blocks of 128 and 64 (mem_eff_attention/kernel_backward.h, workspace_elements_gq)."""
    rows, heads, length, width = query.shape
    accumulator = rows * heads * rounded(length, 128) * rounded(width, 64) * 4 if query.dtype != torch.float32 else 0
    return (rows * heads * length * 4, accumulator)


def _efficient_documents_backward(_sums: Sums, *operands: Any, **_settings: Any) -> tuple[int, ...]:
    """As `_efficient_backward`, over documents: attention_backward.cu lays each out as long as the call's longest."""
    query, starts, longest = operands[1], operands[6], operands[8]
    tokens, heads, width = query.shape[1:]
    laid_out = (starts.numel() - 1) * rounded(longest, 128) * heads
    accumulator = laid_out * rounded(width, 64) * 4 if query.dtype != torch.float32 else 0
    return (max(tokens * heads, laid_out) * 4, accumulator)


def _flash_backward(
    sums: Sums, _grad: Tensor, query: Tensor, key: Tensor, *_rest: Any, **_settings: Any
) -> tuple[int, ...]:
    """flash_attn/flash_api.cpp, mha_bwd: softmax_d and dq_accum in float32; dK and dV of every query head where heads
    share their keys."""
    rows, heads, length, width = query.shape
    padded, wide = rounded(length, 128), rounded(width, 32)
    expanded = 2 * rows * length * heads * width * 2 if key.shape[1] != heads else 0
    accumulated = sums.copies(rows * heads) * rows * padded * heads * wide * 4
    return (rows * heads * padded * 4, accumulated, expanded)


def _varlen_backward(sums: Sums, *operands: Any, **_settings: Any) -> tuple[int, ...]:
    """flash_attn/flash_api.cpp, mha_varlen_bwd: as mha_bwd, each document's rows 128 apart from the next one's.

    A micro-batch may have any number of documents between one a row and what is simulated: the most that this makes.
    """
    _grad, query, key, _value, _output, _sums, starts = operands[:7]
    tokens, heads, width = query.shape
    expanded = 2 * tokens * heads * width * query.element_size() if key.shape[1] != heads else 0
    counts = (sums.rows, starts.numel() - 1)
    accumulated = max(sums.copies(count * heads) * (tokens + 128 * count) for count in counts)
    return (heads * (tokens + 128 * counts[1]) * 4, accumulated * heads * rounded(width, 32) * 4, expanded)


def _softmax_backward(_sums: Sums, grad: Tensor, *_rest: Any, **_settings: Any) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out: grad * output, beside the result."""
    return (grad.nbytes,)


def _losses_in_torch(
    _sums: Sums, logits: Tensor, _targets: Tensor, _weights: Tensor, _factor: float, cap: float
) -> tuple[int, ...]:
    """step/kernels/operators.py: some rows in float32, once more in logsumexp, and what a cap's gradient is made of."""
    copies = (logits.dtype != torch.float32) + (2 if cap else 1)
    return (min(operators.ROWS, logits.shape[0]) * logits.shape[1] * 4,) * copies


# As below, of our own operators in plain torch.
SCRATCH_IN_TORCH: dict[str, Callable[..., tuple[int, ...]]] = {
    "qlora::cross_entropy_": _losses_in_torch,
}
# Bytes that CUDA kernels allocate inside themselves, while their results exist already. By name: the module of the last
# one brings torch's compiler with it, half of the time that an estimate for the CPU takes.
SCRATCH: dict[str, Callable[..., tuple[int, ...]]] = {
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_efficient_attention_backward": _efficient_documents_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_softmax_backward_data": _softmax_backward,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
