"""Several GGUF files in one pass over the weights: merged, changed as llama.cpp wants it, encoded, appended.

A weight is read once, in blocks of rows that are whole heads, and each file takes the block in its own type. There is
no 16-bit model in between, neither on the disk nor in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora.events import Progress, Sink
from qlora.export.gguf.architectures import Layout
from qlora.export.gguf.encode import encode
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
    importance: Mapping[str, NDArray[np.float32]]  # by name in the file


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
    for number, tensor in enumerate(layout.tensors, 1):
        if number > staged.start:
            _write_tensor(tensor, by_parameter[tensor.parameter], files, staged, tools)
            if number == len(layout.tensors) or layout.tensors[number].name != tensor.name:
                _end(tensor, files, staged, tools)
            staged.checkpoint(number)
        done += math.prod(tensor.shape)
        sink.emit(Progress("gguf", done, total, "weights"))


def _write_tensor(
    tensor: GgufTensor, merged: MergedTensor, files: Sequence[GgufFile], staged: StagedExport, tools: Tools
) -> None:
    for block in _taken(tensor, merged):
        rows = tensor.to_gguf(block.to(torch.float32)).contiguous()
        encoded: dict[gguf.GGMLQuantizationType, NDArray[np.uint8]] = {}
        for file in files:
            kind = file.types[tensor.name]
            if kind not in encoded:
                encoded[kind] = encode(rows, kind, tools.library, tools.importance.get(tensor.name), tensor.name)
            staged.append(file.product, file.name, encoded[kind])


def _taken(tensor: GgufTensor, merged: MergedTensor) -> Iterator[Tensor]:
    """The merged rows that the tensor takes, in blocks."""
    first, last = tensor.taken
    start = 0
    for block in merged.blocks(tensor.unit):
        if tensor.place is None:
            yield block
            continue
        part = block[max(0, first - start) : max(0, last - start)]
        start += block.shape[0]
        if part.shape[0]:
            yield part


def _end(tensor: GgufTensor, files: Sequence[GgufFile], staged: StagedExport, tools: Tools) -> None:
    """Rows of zeros that no parameter fills, and bytes up to where the next tensor may begin."""
    rows = (
        math.prod(tensor.stored[:-1]) - tensor.at - (tensor.shape[0] if tensor.place else math.prod(tensor.shape[:-1]))
    )
    for file in files:
        kind = file.types[tensor.name]
        if tensor.place and rows:
            staged.append(file.product, file.name, encode(torch.zeros(rows, tensor.stored[-1]), kind, tools.library))
        if missing := -math.prod(gguf.quant_shape_to_byte_shape(tensor.stored, kind)) % ALIGNMENT:
            staged.append(file.product, file.name, bytes(missing))
