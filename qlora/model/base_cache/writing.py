"""A loaded base, before anything is trained beside it, into a folder: a blob a layer, and the other tensors.

One layer, or one other tensor, is in the host's memory beside the model at a time. Hashes run along in a thread: sha256
as every manifest of ours has, blake3 for whoever reads it back, which is several times as fast.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from qlora import disk, files
from qlora.model.base_cache.contents import Contents, groups, value_of
from qlora.model.base_cache.record import (
    MOST_MATRICES,
    MOST_PIECES,
    PLAIN_FILE,
    BlobRecord,
    FourBit,
    Nested,
    PieceRecord,
    Record,
    StackRecord,
    dtype_name,
)
from qlora.model.identity import BaseIdentity
from qlora.model.layer_blobs import LayerWeights
from qlora.model.tensors import as_bytes

_BLOCK_BYTES = 1 << 24  # written at a time


class CannotKeep(Exception):
    """This model is not to be kept, and why."""


@dataclass
class _Tables:
    """Tables of values that 4-bit codes stand for, each once: all matrices of a model share two."""

    found: list[list[float]] = field(default_factory=list)

    def number(self, table: Tensor) -> int:
        values = table.tolist()
        if values not in self.found:
            self.found.append(values)
        return self.found.index(values)


def write(
    folder: Path, contents: Contents, model: Any, identity: BaseIdentity, written: Callable[[int], None]
) -> tuple[Record, dict[str, str]]:
    """Fill an empty folder; what its manifest is to say, and each file's sha256. `written` is told of bytes.

    Raises CannotKeep where the model holds something else than `contents` foresees, OSError.
    """
    _refuse_too_many(contents.names)
    tables, blobs, sha256 = _Tables(), [], {}
    with ThreadPoolExecutor(1, thread_name_prefix="hashes") as hashing:
        for number, (prefix, weights) in enumerate(groups(model, frozenset(contents.names))):
            if not weights.layout.pieces:
                continue
            _refuse_too_many(weights.layout.pieces, MOST_PIECES)
            name = f"layer-{number:05d}.blob" if prefix else "outside.blob"
            with _hashed_file(folder / name, hashing, written) as file:
                file.append(weights.pack())
            blobs.append(_blob_record(prefix, name, weights, file.blake3()))
            sha256[name] = file.sha256()
        in_blobs = {blob.full_name(piece) for blob in blobs for piece in blob.pieces}
        plain = [name for name in contents.meta_model.sources if name not in in_blobs]
        hashes, sha256[PLAIN_FILE] = _write_plain(folder / PLAIN_FILE, model, plain, hashing, written)
    record = Record(
        kind="base",
        base=contents.base.name,
        identity=identity,
        settings=contents.settings,
        original_bytes=contents.original_bytes,
        four_bit={name: _four_bit(value_of(model, name), tables) for name in contents.four_bit},
        stacks={name: _stack(model.get_submodule(name), tables) for name in contents.stacks},
        tables=tables.found,
        blobs=blobs,
        plain=hashes,
    )
    if sorted(record.names()) != sorted(contents.names) or contents.four_bit.keys() & hashes.keys():
        raise CannotKeep("its layers hold their weights in another way than is known here")
    return record, sha256


def _refuse_too_many(names: Sized, most: int = MOST_MATRICES) -> None:
    """Raises CannotKeep before a manifest is written that nobody would read."""
    if len(names) > most:
        raise CannotKeep(f"it has {len(names):,} weights where {most:,} are the most that is kept")


def _blob_record(layer: str, file: str, weights: LayerWeights, blake3_hex: str) -> BlobRecord:
    pieces = [
        PieceRecord(
            name=piece.name,
            part=piece.part,  # type: ignore[arg-type]
            dtype=dtype_name(piece.dtype),  # type: ignore[arg-type]
            shape=list(piece.shape),
            offset=piece.offset,
        )
        for piece in weights.layout.pieces
    ]
    return BlobRecord(layer=layer, file=file, bytes=weights.layout.nbytes, blake3=blake3_hex, pieces=pieces)


def _four_bit(weight: Any, tables: _Tables) -> FourBit:
    state, nested = weight.quant_state, None
    if state.nested:
        if state.state2.dtype != torch.float32:
            raise CannotKeep(f"its block constants were {state.state2.dtype}")
        nested = Nested(
            blocksize=state.state2.blocksize, code=tables.number(state.state2.code), offset=float(state.offset)
        )
    return FourBit(
        shape=list(state.shape),
        dtype=dtype_name(state.dtype),  # type: ignore[arg-type]
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        code=tables.number(state.code),
        nested=nested,
    )


def _stack(stack: Any, tables: _Tables) -> StackRecord:
    found = {name: tables.number(stack._buffers[name]) for name in stack.TABLES if name in stack._buffers}
    return StackRecord(shape=list(stack.shape), quant_type=stack.quant_type, tables=found)


def _write_plain(
    path: Path, model: Any, names: Iterable[str], hashing: Executor, written: Callable[[int], None]
) -> tuple[dict[str, str], str]:
    """A safetensors file of them, one after the other; each one's blake3, and the file's sha256."""
    header, end, hashes = {}, 0, {}
    for name in names:
        value = value_of(model, name)
        header[name] = {
            "dtype": dtype_name(value.dtype),
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with _hashed_file(path, hashing, written) as file:
        file.append(torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text), dtype=torch.uint8))
        file.blake3()
        for name in header:
            file.append(value_of(model, name))
            hashes[name] = file.blake3()
    return hashes, file.sha256()


class _HashedFile:
    """A file that is written from front to back, and its two hashes."""

    def __init__(self, file: Any, hashing: Executor, written: Callable[[int], None]) -> None:
        self._file, self._hashing, self._written = file, hashing, written
        self._sha256, self._blake3 = hashlib.sha256(), blake3()
        self._hashed: Future[None] | None = None

    def append(self, value: Tensor) -> None:
        """The bytes of a tensor, wherever it lies, which stays as it is. Through the host in blocks."""
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.nbytes else value.new_empty(0)
        for start in range(0, flat.numel(), _BLOCK_BYTES):
            block = as_bytes(flat[start : start + _BLOCK_BYTES].cpu())
            self._settle()
            self._hashed = self._hashing.submit(self._update, block)
            files.write_all(self._file, block)
            self._written(block.nbytes)

    def blake3(self) -> str:
        """Of what was appended since the last call."""
        self._settle()
        found, self._blake3 = self._blake3.hexdigest(), blake3()
        return found

    def sha256(self) -> str:
        """Of all of it."""
        self._settle()
        return self._sha256.hexdigest()

    def _update(self, block: memoryview) -> None:
        self._sha256.update(block)
        self._blake3.update(block)

    def _settle(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None


@contextmanager
def _hashed_file(path: Path, hashing: Executor, written: Callable[[int], None]) -> Iterator[_HashedFile]:
    with disk.open_to_write(path, "new", 0o600) as file:
        yield _HashedFile(file, hashing, written)
