"""A kept base into a model: each tensor from its file into its final form, hashed while it is read.

A layer's tensors are handed out once all of its bytes were hashed, so that none of a damaged file is ever computed
with. On the CPU they are read straight into the memory in which they stay; on their way to a GPU, through two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from qlora import files
from qlora.device import is_card
from qlora.errors import ModelError
from qlora.model.base_cache.contents import Contents
from qlora.model.base_cache.record import PLAIN_FILE, BlobRecord, FourBit, Record, Sized, dtype_name
from qlora.model.nf4 import Quantized, check_state
from qlora.model.tensors import TORCH_DTYPES, as_bytes, read_header
from qlora.third_party import import_bitsandbytes

_BLOCK_BYTES = 1 << 24  # in flight to a GPU


class Damaged(Exception):
    """What lies there is not what its manifest says: what of it, and how that shows."""


class Unreadable(Damaged):
    """The system does not let it be read, now."""


@dataclass(frozen=True)
class Stacked:
    """The experts of a projection in 4 bit: every buffer of the stack that holds them, by its name."""

    buffers: Mapping[str, Tensor]


Kept = Quantized | Stacked | Tensor


@dataclass(frozen=True)
class Homes:
    """Where values are to lie: `of` a parameter by its name, and the `device` that computes."""

    of: Callable[[str], torch.device]
    device: torch.device


@dataclass(frozen=True)
class KeptBase:
    """A base that is kept in `folder` and belongs to the model that `contents` describes."""

    folder: Path
    sized: Sized
    contents: Contents

    @property
    def record(self) -> Record:
        return self.sized.record

    @property
    def bytes(self) -> int:
        return sum(self.sized.bytes.values())

    def check(self) -> None:
        """Whether it holds each value of the model once, in its form. Raises Damaged."""
        record, contents = self.record, self.contents
        held = (record.four_bit.keys(), record.stacks.keys()) == (contents.four_bit.keys(), contents.stacks.keys())
        if sorted(record.names()) != sorted(contents.names) or not held:
            raise Damaged("its tensors are others than the model's")
        codes = {blob.full_name(piece) for blob in record.blobs for piece in blob.pieces if piece.part == "codes"}
        if codes != record.four_bit.keys() | record.stacks.keys():
            raise Damaged("not the same tensors are in 4 bit")
        self._check_stacks()
        wanted = contents.quantization
        for name, one in record.four_bit.items():
            kind = (one.quant_type, one.nested is not None)
            if tuple(one.shape) != contents.four_bit[name] or one.code >= len(record.tables):
                raise Damaged(f"{name} is of another shape")
            if one.nested is not None and one.nested.code >= len(record.tables):
                raise Damaged(f"{name} has no table")
            if not contents.base.stored_4bit and kind != (wanted.type, wanted.double_quant):
                raise Damaged(f"{name} is in another form")
        for blob in record.blobs:
            parts = [(blob.full_name(piece), piece.part) for piece in blob.pieces]
            if not parts:
                raise Damaged(f"{blob.file} holds nothing")
            if len(set(parts)) != len(parts):
                raise Damaged(f"{blob.file} holds a tensor twice")

    def _check_stacks(self) -> None:
        """Whether each has its parts and tables in the model's shapes. Raises Damaged."""
        found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for blob in self.record.blobs:
            for piece in blob.pieces:
                found.setdefault(blob.full_name(piece), {})[piece.part] = piece.dtype, tuple(piece.shape)
        for name, one in self.record.stacks.items():
            stack = self.contents.stacks[name]
            sizes = {key: (dtype_name(dtype), shape) for key, (shape, dtype) in stack.sizes.items()}
            wanted = {part: size for part, size in sizes.items() if part in stack.IN_BLOB}
            if (tuple(one.shape), one.quant_type) != (tuple(stack.shape), stack.quant_type) or found[name] != wanted:
                raise Damaged(f"{name} is in another form")
            lengths = {key: shape for key, (_, shape) in sizes.items() if key in stack.TABLES}
            tables, there = self.record.tables, one.tables.items()
            if {key: (len(tables[number]),) for key, number in there if number < len(tables)} != lengths:
                raise Damaged(f"{name} has no table")

    def values(self, homes: Homes, read: Callable[[int], None]) -> Iterator[tuple[str, Kept]]:
        """Every value of the model by its name, where it is to lie. `read` is told of bytes. Raises Damaged."""
        tables = [torch.tensor(values, dtype=torch.float32, device=homes.device) for values in self.record.tables]
        with ThreadPoolExecutor(1, thread_name_prefix="blake3") as hashing:
            for blob in self.record.blobs:
                found = self.read_blob(blob, _Reading(hashing, homes, read))
                yield from self._of_blob(blob, found, tables)
                del found
            yield from self._plain(_Reading(hashing, homes, read))

    def read_blob(self, blob: BlobRecord, reading: _Reading) -> dict[tuple[str, str], Tensor]:
        """The tensors of a layer by their names and parts, once all of its bytes were hashed. Raises Damaged."""
        found: dict[tuple[str, str], Tensor] = {}
        end = 0
        with reading.opened(self.folder / blob.file, blob.bytes):
            for piece in blob.pieces:
                reading.skip(piece.offset - end)
                found[blob.full_name(piece), piece.part] = reading.tensor(
                    blob.full_name(piece), piece.dtype, tuple(piece.shape)
                )
                end = piece.offset + piece.nbytes
            reading.skip(blob.bytes - end)
            reading.expect(blob.blake3, blob.file)
        return found

    def _of_blob(
        self, blob: BlobRecord, found: Mapping[tuple[str, str], Tensor], tables: list[Tensor]
    ) -> Iterator[tuple[str, Kept]]:
        for piece in blob.pieces:
            name = blob.full_name(piece)
            if piece.part == "codes" and (stack := self.record.stacks.get(name)) is not None:
                parts = {part: tensor for (owner, part), tensor in found.items() if owner == name}
                yield name, Stacked({**parts, **{key: tables[number].clone() for key, number in stack.tables.items()}})
            elif piece.part == "codes":
                yield name, _quantized(name, self.record.four_bit[name], found, tables)
            elif piece.part == "values":
                self._expect_form(name, piece)
                yield name, found[name, "values"]

    def _plain(self, reading: _Reading) -> Iterator[tuple[str, Tensor]]:
        try:
            entries = read_header(self.folder / PLAIN_FILE)
        except ModelError as error:
            raise Damaged(error.what) from error
        if entries.keys() != self.record.plain.keys():
            raise Damaged(f"{PLAIN_FILE} holds other tensors")
        with reading.opened(self.folder / PLAIN_FILE, self.sized.bytes[PLAIN_FILE]):
            reading.skip(min((entry.offset for entry in entries.values()), default=0))
            for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
                self._expect_form(name, entry)
                reading.begin()
                value = reading.tensor(name, entry.dtype, entry.shape)
                reading.expect(self.record.plain[name], f"{PLAIN_FILE}: {name}")
                yield name, value

    def _expect_form(self, name: str, found: Any) -> None:
        dtype, shape = self.contents.plain[name]
        if (found.dtype, tuple(found.shape)) != (dtype_name(dtype), shape):
            raise Damaged(f"{name} is {found.dtype} {list(found.shape)}, the model's is {dtype} {list(shape)}")


class OneByOne:
    """The 4-bit weights of a kept base by their names, for whoever goes over a model a tensor at a time.

    The blob of a layer is read whole, checked, and held until a weight of another one is asked for.
    """

    def __init__(self, kept: KeptBase, device: torch.device) -> None:
        self._kept, self._device = kept, device
        self._blobs = {
            blob.full_name(piece): blob for blob in kept.record.blobs for piece in blob.pieces if piece.part == "codes"
        }
        self._held: tuple[BlobRecord, dict[tuple[str, str], Tensor]] | None = None

    def read(self, name: str) -> Quantized:
        """One weight, on the device. Raises Damaged."""
        record, blob = self._kept.record, self._blobs[name]
        if self._held is None or self._held[0] is not blob:
            self._held = None
            with ThreadPoolExecutor(1, thread_name_prefix="blake3") as hashing:
                homes = Homes(lambda _: self._device, self._device)
                found = self._kept.read_blob(blob, _Reading(hashing, homes, lambda _: None))
            self._held = blob, found
        tables = [torch.tensor(values, dtype=torch.float32, device=self._device) for values in record.tables]
        return _quantized(name, record.four_bit[name], self._held[1], tables)


def _quantized(name: str, kept: FourBit, found: Mapping[tuple[str, str], Tensor], tables: list[Tensor]) -> Quantized:
    """A weight in 4 bit as bitsandbytes holds it. Raises Damaged where its parts do not belong together."""
    bnb = import_bitsandbytes().functional
    try:
        codes, absmax = found[name, "codes"], found[name, "absmax"]
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size(kept.shape),
            code=tables[kept.code],
            blocksize=kept.blocksize,
            quant_type=kept.quant_type,
            dtype=getattr(torch, TORCH_DTYPES[kept.dtype]),
        )
        if (nested := kept.nested) is not None:
            state.state2 = bnb.QuantState(
                absmax=found[name, "nested_absmax"],
                code=tables[nested.code],
                blocksize=nested.blocksize,
                dtype=torch.float32,
            )
            state.offset = torch.tensor(nested.offset, dtype=torch.float32, device=tables[nested.code].device)
            state.nested = True
        check_state(state, codes)
    except (KeyError, ValueError) as error:
        raise Damaged(f"{name} is not a weight in 4 bit ({error})") from error
    return Quantized(codes, state)


@dataclass
class _Reading:
    """A file read from front to back; its hash runs along in a thread, one block behind."""

    hashing: Executor
    homes: Homes
    told: Callable[[int], None]
    _file: Any = None
    _hash: Any = field(default_factory=blake3)
    _hashed: Future[Any] | None = None
    _blocks: list[Tensor] = field(default_factory=list)

    @contextmanager
    def opened(self, path: Path, nbytes: int) -> Iterator[None]:
        """Raises Damaged for a file of another size, and for whatever the system refuses inside of the block."""
        try:
            with files.open_to_read(path) as file:
                self._file = file.raw
                if (size := self._file.seek(0, 2)) != nbytes:
                    raise Damaged(f"{path.name} has {size:,} bytes, not {nbytes:,}")
                self._file.seek(0)
                yield
        except (files.UnsafePathError, FileNotFoundError) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            raise Unreadable(f"{path.name} cannot be read: {error.strerror or error}") from error
        finally:
            self._settle()

    def begin(self) -> None:
        """What is read from here on is hashed by itself."""
        self._settle()
        self._hash = blake3()

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """The next bytes as a tensor where the parameter `name` is to lie."""
        home = self.homes.of(name)
        whole = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]), device=home)
        if not whole.nbytes:
            return whole
        if not is_card(home):
            self._fill(as_bytes(whole))
            return whole
        flat = whole.view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _BLOCK_BYTES):
            part = flat[start : start + _BLOCK_BYTES]
            block = self._next_block()[: part.numel()]
            self._fill(as_bytes(block))
            part.copy_(block)
        return whole

    def skip(self, count: int) -> None:
        """Read and hash what belongs to no tensor: the space between two, a header."""
        while count > 0:
            block = self._next_block()[: min(count, _BLOCK_BYTES)]
            self._fill(as_bytes(block))
            count -= block.numel()

    def expect(self, wanted: str, what: str) -> None:
        self._settle()
        if self._hash.hexdigest() != wanted:
            raise Damaged(f"{what} is damaged (its hash is another one)")

    def _fill(self, view: memoryview) -> None:
        left = view
        while left:
            count = self._file.readinto(left)
            if not count:
                raise Damaged("a file became shorter while it was read")
            left = left[count:]
        self._settle()
        self._hashed = self.hashing.submit(self._hash.update, view)
        self.told(len(view))

    def _settle(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None

    def _next_block(self) -> Tensor:
        """The older one of two: its bytes are hashed and copied."""
        full = len(self._blocks) == 2
        self._blocks.append(self._blocks.pop(0) if full else torch.empty(_BLOCK_BYTES, dtype=torch.uint8))
        return self._blocks[-1]
