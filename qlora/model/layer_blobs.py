"""The frozen weights of one decoder layer as one block of bytes, and a layer's parameters as views of such a block.

What is in a blob: every matrix that is not trained, in 4 bit as its codes, its block constants and the constants of
those, in 16 bit as its values. What belongs to all blocks of a matrix (the table of 16 values, the table of 256, the
offset) stays with it, as norms and biases do: under a MiB a layer. Layers of one kind have equal layouts, so that one
place in a GPU's memory serves all of them in turn, and a file of one of them can be read as another's.

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
    """A tensor in a blob: `part` of the parameter `name` (within its layer, as the base has it), at byte `offset`."""

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
    def of(cls, parameters: Iterable[tuple[str, nn.Parameter]]) -> Layout:
        """Of frozen matrices by their names, in their order (`matrices_of`)."""
        pieces, end = [], 0
        for name, parameter in parameters:
            for part, tensor in _parts(parameter):
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
        found = [(name, parameter) for name, parameter in matrices_of(layer) if not kept(name)]
        self.layout = Layout.of(found)
        self._owners = {name: _owner(layer, name) for name, _ in found}

    def pack(self) -> Tensor:
        """A blob (layout.nbytes,) on the host, with their bytes; what lies between pieces is zero, for its hash."""
        blob = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        for piece, view in self.layout.views(blob):
            view.copy_(_part(self._parameter(piece.name), piece.part))
        return blob

    def point(self, blob: Tensor) -> None:
        """Have the layer compute with a blob: nothing is copied."""
        for piece, view in self.layout.views(blob):
            _put(self._parameter(piece.name), piece.part, view)

    def take_away(self, device: torch.device) -> None:
        """Leave nothing in their place; what is empty is on `device`, where the layer computes."""
        for piece in self.layout.pieces:
            gone = None if piece.part in (ABSMAX, NESTED) else torch.empty(0, dtype=piece.dtype, device=device)
            _put(self._parameter(piece.name), piece.part, gone)

    def _parameter(self, name: str) -> Any:
        owner, leaf = self._owners[name]
        return getattr(owner, leaf)


def matrices_of(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Frozen parameters of two dimensions and more by their names in the layer, each once."""
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            yield name, parameter


def _owner(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return layer.get_submodule(path), leaf


def _parts(parameter: Any) -> Iterator[tuple[str, Tensor]]:
    state = getattr(parameter, "quant_state", None)
    yield VALUES if state is None else CODES, parameter.data
    if state is not None:
        yield ABSMAX, state.absmax
        if state.nested:
            yield NESTED, state.state2.absmax


def _part(parameter: Any, part: str) -> Tensor:
    return dict(_parts(parameter))[part]


def _put(parameter: Any, part: str, tensor: Tensor | None) -> None:
    if part == ABSMAX:
        parameter.quant_state.absmax = tensor
    elif part == NESTED:
        parameter.quant_state.state2.absmax = tensor
    else:
        parameter.data = tensor
