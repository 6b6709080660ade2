"""The frozen weights of one decoder layer as one block of bytes, and a layer's parameters as views of such a block.

What is in a blob: every matrix that is not trained, in 4 bit as its codes, its block constants and the constants of
those, in 16 bit as its values; and the stacks of a mixture's experts, of which each says itself which of its buffers
are weights (`IN_BLOB`), an expert's offset among them. What belongs to all blocks of a matrix (the table of 16 values,
the table of 256, the offset) stays with it, as norms and biases do: under a MiB a layer. Layers of one kind have equal
layouts, so that one place in a GPU's memory serves all of them in turn, and a file of one can be read as another's.

Whoever holds a layer's weights somewhere else leaves nothing in their place: matrices of no values, and no constants.
Reading those is an error in Python, in every product and in dequantizing. (An empty tensor of constants would be none:
bitsandbytes' kernels trust sizes and read past the end of it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # bytes: the widest load of a GPU's kernel

# The parts of a matrix in 4 bit, and the only one of a matrix in 16 bit.
CODES, ABSMAX, NESTED, VALUES = "codes", "absmax", "nested_absmax", "values"


@dataclass(frozen=True)
class Piece:
    """A tensor in a blob: `part` of the parameter or stack `name` (within its layer, as the base has it), at byte
    `offset`."""

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, blob: Tensor) -> Tensor:
        """Its view of a blob (nbytes,) of uint8."""
        return blob[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a blob of `nbytes`, a multiple of ALIGNMENT. Equal for layers of one kind."""

    pieces: tuple[Piece, ...]
    nbytes: int

    @classmethod
    def of(cls, matrices: Iterable[tuple[str, nn.Parameter | nn.Module]]) -> Layout:
        """Of frozen matrices and stacks by their names, in their order (`matrices_of`, `stacks_of`)."""
        pieces, end = [], 0
        for name, matrix in matrices:
            for part, tensor in parts_of(matrix):
                piece = Piece(name, part, tensor.dtype, tuple(tensor.shape), end)
                pieces.append(piece)
                end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(pieces), end)

    def views(self, blob: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        for piece in self.pieces:
            yield piece, piece.of(blob)


class LayerWeights:
    """The frozen matrices of one layer, wherever they are now. Adapters may be put beside them meanwhile: modules are
    remembered, not their names, and a parameter is asked for whenever it is needed."""

    def __init__(self, layer: nn.Module, kept: Callable[[str], bool] = lambda name: False) -> None:
        """`kept`: names of parameters within the layer that stay where they are."""
        every: list[tuple[str, Any]] = [*matrices_of(layer), *stacks_of(layer)]
        found = [(name, one) for name, one in every if not kept(name)]
        self.layout = Layout.of(found)
        self._owners = {name: _owner(layer, name) for name, _ in found}

    def pack(self) -> Tensor:
        """A blob (layout.nbytes,) on the host, with their bytes; what lies between pieces is zero, for its hash."""
        blob = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        for piece, view in self.layout.views(blob):
            view.copy_(dict(parts_of(self._matrix(piece.name)))[piece.part])
        return blob

    def point(self, blob: Tensor) -> None:
        """Have the layer compute with a blob: nothing is copied."""
        for piece, view in self.layout.views(blob):
            put_part(self._matrix(piece.name), piece.part, view)

    def take_away(self, device: torch.device) -> None:
        """Leave nothing in their place; what is empty is on `device`, where the layer computes."""
        for piece in self.layout.pieces:
            matrix = self._matrix(piece.name)
            nothing = isinstance(matrix, nn.Module) or piece.part in (ABSMAX, NESTED)
            gone = None if nothing else torch.empty(0, dtype=piece.dtype, device=device)
            put_part(matrix, piece.part, gone)

    def begin_again(self) -> None:
        """Matrices in 16 bit have their shapes again, and no values: whoever fills them asks for that."""
        for piece in self.layout.pieces:
            if piece.part == VALUES:
                owner, leaf = self._owners[piece.name]
                empty = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _matrix(self, name: str) -> Any:
        owner, leaf = self._owners[name]
        return getattr(owner, leaf)


def matrices_of(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Frozen parameters of two dimensions and more by their names in the layer, each once."""
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            yield name, parameter


def stacks_of(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that hold all experts of a projection, by their names in the layer: they name their weights."""
    for name, module in layer.named_modules():
        if hasattr(type(module), "IN_BLOB"):
            yield name, module


def parts_of(matrix: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a frozen parameter, or of a stack, that are in a blob."""
    if isinstance(matrix, nn.Module):
        found = ((part, matrix._buffers.get(part)) for part in matrix.IN_BLOB)  # type: ignore[union-attr]
        yield from ((part, tensor) for part, tensor in found if tensor is not None)
        return
    state = getattr(matrix, "quant_state", None)
    yield VALUES if state is None else CODES, matrix.data
    if state is not None:
        yield ABSMAX, state.absmax
        if state.nested:
            yield NESTED, state.state2.absmax


def put_part(matrix: Any, part: str, tensor: Tensor | None) -> None:
    if isinstance(matrix, nn.Module):
        matrix._buffers[part] = tensor
    elif part == ABSMAX:
        matrix.quant_state.absmax = tensor
    elif part == NESTED:
        matrix.quant_state.state2.absmax = tensor
    else:
        matrix.data = tensor


def matrix_at(layer: nn.Module, name: str) -> Any:
    """A parameter or a stack by its name in the layer."""
    owner, leaf = _owner(layer, name)
    return getattr(owner, leaf)


def _owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return layer.get_submodule(path), leaf
