"""What the manifest of a kept base says: which base it is, how it was put into 4 bit, and what lies in each file.

It is read as if a stranger had written it: bounded, its types checked, and then compared with the model that it is to
fill, tensor by tensor. What a number of it could make large (a shape, an offset) is compared with the file's own size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from blake3 import blake3
from pydantic import Field

from qlora import foreign_json, manifest
from qlora.foreign_json import ForeignFileError, ForeignModel
from qlora.model.base_cache.places import KIND
from qlora.model.identity import BaseIdentity
from qlora.model.tensors import DTYPE_BITS, TORCH_DTYPES

PLAIN_FILE = "others.safetensors"  # embeddings, head, norms, biases: what is in no layer's blob
FORM = 1  # of the files; another one is another folder
# A matrix has up to 1,350 bytes and 45 values of the manifest: as many as fit into what `manifest.read` takes. The
# largest base known to us without experts has 882 of them (Llama 3.1 405B); of experts, a stack counts as one.
MOST_MATRICES = 40_000
MOST_PIECES = 10_000  # of a layer, and layers
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shape = Annotated[list[Count], Field(max_length=8)]
Dtype = Literal["U8", "F32", "F16", "BF16", "I64", "I32", "BOOL"]


class Settings(ForeignModel):
    """What decides the bytes beside the base's own: `structure` is a hash of which tensor fills which parameter, and in
    what form, `quantizer` the version of what puts it into 4 bit."""

    form: int
    type: str
    double_quant: bool
    structure: Hash
    quantizer: str

    @property
    def ending(self) -> str:
        """The end of a folder's name: all but the base."""
        hashed = blake3(self.model_dump_json().encode()).hexdigest(length=8)
        return f"{self.type}-{'double' if self.double_quant else 'single'}-{hashed}"


class Nested(ForeignModel):
    """How the constants of a matrix's blocks are kept in 8 bit: `code` is the number of a table of 256 values."""

    blocksize: Annotated[int, Field(ge=1, le=1 << 16)]
    code: Count
    offset: float


class FourBit(ForeignModel):
    """What belongs to all blocks of a matrix in 4 bit: `code` is the number of a table of 16 values, `dtype` the type
    that it had."""

    shape: Annotated[list[Count], Field(min_length=2, max_length=8)]
    dtype: Literal["F32", "F16", "BF16"]
    blocksize: Annotated[int, Field(ge=1, le=1 << 16)]
    quant_type: Literal["nf4", "fp4"]
    code: Count
    nested: Nested | None


class StackRecord(ForeignModel):
    """What belongs to all experts of a projection in 4 bit: `tables` are the numbers of the tables that it has, by the
    names of its buffers. Offsets are an expert's own, and in the blob."""

    shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    quant_type: Annotated[str, Field(pattern=r"^[a-z0-9]{3,16}$")]
    tables: Annotated[dict[str, Count], Field(max_length=4)]


class PieceRecord(ForeignModel):
    """A tensor in a blob, as `layer_blobs.Piece`."""

    name: str
    part: Literal["codes", "absmax", "nested_absmax", "offset", "scales", "values"]
    dtype: Dtype
    shape: Shape
    offset: Count

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class BlobRecord(ForeignModel):
    """A layer's file: `layer` is its name in the model, "" where the names of the pieces are whole."""

    layer: str
    file: Annotated[str, Field(pattern=r"^(?:layer-[0-9]{5}|outside)\.blob$")]
    bytes: Count
    blake3: Hash
    pieces: Annotated[list[PieceRecord], Field(max_length=MOST_PIECES)]

    def full_name(self, piece: PieceRecord) -> str:
        return f"{self.layer}.{piece.name}" if self.layer else piece.name

    def check(self) -> None:
        """Raises ValueError for pieces that overlap or lie outside of the file."""
        end = 0
        for piece in self.pieces:
            if piece.offset < end:
                raise ValueError(f"{self.file}: {piece.name} overlaps another tensor")
            end = piece.offset + piece.nbytes
        if end > self.bytes:
            raise ValueError(f"{self.file}: its tensors need {end:,} bytes, it has {self.bytes:,}")


class Record(ForeignModel):
    """The manifest's own part of a kept base. `plain` has a hash of each tensor in PLAIN_FILE, `original_bytes` what
    reading the original takes."""

    kind: Literal["base"]
    base: str
    identity: BaseIdentity
    settings: Settings
    original_bytes: Count
    tables: Annotated[list[Annotated[list[float], Field(max_length=256)]], Field(max_length=64)]
    four_bit: Annotated[dict[str, FourBit], Field(max_length=MOST_MATRICES)]
    stacks: Annotated[dict[str, StackRecord], Field(max_length=MOST_MATRICES)] = Field(default_factory=dict)
    blobs: Annotated[list[BlobRecord], Field(max_length=MOST_PIECES)]
    plain: Annotated[dict[str, Hash], Field(max_length=MOST_MATRICES)]

    def names(self) -> Iterator[str]:
        """The parameters that it holds, once for each time that it does."""
        yield from self.plain
        for blob in self.blobs:
            yield from (blob.full_name(piece) for piece in blob.pieces if piece.part in ("codes", "values"))

    def about(self) -> dict[str, Any]:
        """For `disk.publish_filled`."""
        assert self.kind == KIND
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]


class Sized(NamedTuple):
    """A record, and the size of each of its files."""

    record: Record
    bytes: Mapping[str, int]


def read(folder: Path) -> Sized:
    """What a kept base's manifest says. Raises ForeignFileError, and FileNotFoundError where there is none."""
    sizes = {name: one.bytes for name, one in manifest.recorded(folder).items()}
    found = foreign_json.checked(Record, manifest.read(folder), manifest.MANIFEST)
    wanted = {PLAIN_FILE: sizes.get(PLAIN_FILE, -1), **{blob.file: blob.bytes for blob in found.blobs}}
    if sizes != wanted or len(found.blobs) + 1 != len(wanted):
        raise ForeignFileError(f"{manifest.MANIFEST}: its files are others than its layers'")
    try:
        for blob in found.blobs:
            blob.check()
    except ValueError as error:
        raise ForeignFileError(f"{manifest.MANIFEST}: {error}") from error
    return Sized(found, sizes)


def dtype_name(dtype: Any) -> str:
    """safetensors' name of torch's dtype."""
    return next(name for name, other in TORCH_DTYPES.items() if str(dtype) == f"torch.{other}")
