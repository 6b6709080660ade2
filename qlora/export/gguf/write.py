"""Several GGUF files in one pass over the weights: merged, changed as llama.cpp wants it, encoded, appended.

A weight is read once, in blocks of rows that are whole heads, and each file takes the block in its own type. There is
no 16-bit model in between, neither on the disk nor in memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora.events import Progress, Sink
from qlora.export.gguf import packed
from qlora.export.gguf.architectures import Layout
from qlora.export.gguf.encode import Encoding, begin, encode, encoding_threads
from qlora.export.gguf.family import GgufTensor
from qlora.export.gguf.metadata import ALIGNMENT, Entry, header, padded
from qlora.export.llama_cpp.library import Ggml
from qlora.export.merge.merge import MergedTensor
from qlora.export.staging import StagedExport

F32 = gguf.GGMLQuantizationType.F32


@dataclass(frozen=True)
class GgufFile:
    """A file to write: the product it belongs to, its name there, keys, and the type of each tensor."""

    product: str
    name: str
    keys: tuple[Entry, ...]
    types: Mapping[str, gguf.GGMLQuantizationType]

    def nbytes(self, layout: Layout) -> int:
        """Bytes of the weights, without the header."""
        sizes = [values.nbytes for values in layout.constants.values()]
        stored = layout.stored.items()
        sizes += [math.prod(gguf.quant_shape_to_byte_shape(shape, self.types[name])) for name, shape in stored]
        return sum(size + -size % ALIGNMENT for size in sizes)

    def header(self, layout: Layout) -> bytes:
        tensors = [(name, values.shape, F32) for name, values in layout.constants.items()]
        tensors += [(name, shape, self.types[name]) for name, shape in layout.stored.items()]
        return header(layout.arch, self.keys, tensors)


@dataclass(frozen=True)
class Tools:
    """What encoding needs beside the weights: ggml for K- and I-quants, and the importance of input channels."""

    library: Ggml | None
    importance: Mapping[str, NDArray[np.float32]]  # by name in the file: (in,), of experts (E, in)


def write(
    layout: Layout,
    merged: Sequence[MergedTensor],
    files: Sequence[GgufFile],
    staged: StagedExport,
    tools: Tools,
    sink: Sink,
) -> None:
    """Fill `files` from the merged model (fp32 blocks), going on after the tensors that `staged` has already."""
    by_parameter = {tensor.parameter: tensor for tensor in merged}
    total = sum(math.prod(tensor.shape) for tensor in layout.tensors)
    done = 0
    if staged.start == 0:
        for file in files:
            staged.append(file.product, file.name, file.header(layout))
            for constant in layout.constants.values():
                staged.append(file.product, file.name, padded(constant.tobytes()))
    with encoding_threads() as pool:
        queue = _InOrder(pool)
        for number, tensor in enumerate(layout.tensors, 1):
            if number > staged.start:
                if tensor.packed:
                    _write_packed(tensor, layout, by_parameter, files, staged, queue)
                else:
                    _write_tensor(tensor, by_parameter[tensor.parameter], files, staged, tools, queue)
                if number == len(layout.tensors) or layout.tensors[number].name != tensor.name:
                    queue.add(partial(_end, tensor, files, staged, tools))
                queue.add(partial(staged.checkpoint, number))
            done += math.prod(tensor.shape)
            queue.add(partial(sink.emit, Progress("gguf", done, total, "weights")))
        queue.finish()


class _InOrder:
    """What this thread does in this order, some of it when `pool` has encoded a block; what need not wait is done now.

    So the threads have work while the next blocks are read and merged, over the ends of tensors too: GGML_PIECE values
    at a time, four in a block. Waiting are two blocks and half a one a thread (of 2 MiB, and what they are encoded to).
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self._most = 2 + torch.get_num_threads() // 2
        self._waiting: deque[tuple[bool, Callable[[], None]]] = deque()
        self._encoded = 0  # of those that wait

    def add(self, do: Callable[[], None], encoded: bool = False) -> None:
        """Have `do` done, which waits for a block where `encoded`."""
        self._waiting.append((encoded, do))
        self._encoded += encoded
        while self._waiting and not 0 < self._encoded <= self._most:
            self._next()

    def finish(self) -> None:
        while self._waiting:
            self._next()

    def _next(self) -> None:
        encoded, do = self._waiting.popleft()
        self._encoded -= encoded
        do()


def _write_tensor(
    tensor: GgufTensor,
    merged: MergedTensor,
    files: Sequence[GgufFile],
    staged: StagedExport,
    tools: Tools,
    queue: _InOrder,
) -> None:
    kinds, at = {file.types[tensor.name] for file in files}, tensor.at
    with closing(_taken(tensor, merged)) as blocks:
        for block in blocks:
            changed = tensor.to_gguf(block.to(torch.float32)).contiguous()
            for rows in changed if changed.ndim == 3 else (changed,):  # an expert, a head: each has its own importance
                how = tools.library, _importance(tensor, at, tools)
                encoded = {kind: begin(rows, kind, how, tensor.name, queue.pool) for kind in kinds}
                waits = any(one.pieces for one in encoded.values())
                queue.add(partial(_append, tensor.name, encoded, files, staged), waits)
                at += rows.shape[0] if rows.ndim else 1


def _write_packed(
    tensor: GgufTensor,
    layout: Layout,
    merged: Mapping[str, MergedTensor],
    files: Sequence[GgufFile],
    staged: StagedExport,
    queue: _InOrder,
) -> None:
    """Experts in MXFP4: codes and scales, two tensors of the base, become the bytes of one, once for the two."""
    if tensor.packed == packed.SCALES:
        return
    (scales,) = (one for one in layout.tensors if one.name == tensor.name and one.packed == packed.SCALES)
    for expert in packed.experts_of(tensor, merged[tensor.parameter], merged[scales.parameter]):
        content = expert.contiguous().numpy()
        for file in files:
            queue.add(partial(staged.append, file.product, file.name, content))


def _importance(tensor: GgufTensor, at: int, tools: Tools) -> NDArray[np.float32] | None:
    """The importance (in,) of the tensor's row `at`: of experts, those of the expert that it is of."""
    found = tools.importance.get(tensor.name)
    return found[at // tensor.stored[-2]] if found is not None and found.ndim == 2 else found


def _append(
    name: str, encoded: Mapping[gguf.GGMLQuantizationType, Encoding], files: Sequence[GgufFile], staged: StagedExport
) -> None:
    for file in files:
        staged.append(file.product, file.name, encoded[file.types[name]].result())


def _taken(tensor: GgufTensor, merged: MergedTensor) -> Generator[Tensor, None, None]:
    """The merged rows that the tensor takes, in blocks."""
    first, last = tensor.taken
    start = 0
    with closing(merged.blocks(tensor.unit)) as blocks:
        for block in blocks:
            if tensor.place is None:
                yield block
                continue
            part = block[max(0, first - start) : max(0, last - start)]
            start += block.shape[0]
            if part.shape[0]:
                yield part


def _end(tensor: GgufTensor, files: Sequence[GgufFile], staged: StagedExport, tools: Tools) -> None:
    """Rows of zeros that no parameter fills, and bytes up to where the next tensor may begin."""
    rows = 0 if tensor.packed else math.prod(tensor.stored[:-1]) - tensor.at - math.prod(tensor.shape[:-1])
    for file in files:
        kind = file.types[tensor.name]
        if tensor.place and rows:
            staged.append(file.product, file.name, encode(torch.zeros(rows, tensor.stored[-1]), kind, tools.library))
        if missing := -math.prod(gguf.quant_shape_to_byte_shape(tensor.stored, kind)) % ALIGNMENT:
            staged.append(file.product, file.name, bytes(missing))
