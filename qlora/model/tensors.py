"""The tensors of a folder of safetensors files: found, checked and read by ourselves.

A base comes from a stranger. Its index names files and its headers name byte ranges, so every name and number is
checked before it is used: names through `files.inside`, ranges against the file's size, without torch and without
reading any weight. What is opened is the path that this check resolved, and no link behind it. The layout is the
safetensors format's own: 8 bytes (little endian) with the header's length, the header as JSON, then the data without
holes (https://github.com/huggingface/safetensors#format). Tensors are read by offset into memory of our own, in rows
where wanted; no file stays open or mapped in between.
"""

from __future__ import annotations

import math
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qlora import files, foreign_json
from qlora.errors import ModelError

if TYPE_CHECKING:
    import torch

    from qlora.page_cache import LeftAsFound

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# How pickles begin: torch's zip, and pickle's own protocols 2 to 5.
PICKLE_MAGICS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# A tensor takes about 150 bytes of a header, and 100 of an index: the largest index known to us (DeepSeek-V3, 91,991
# tensors) has 9 MB. The format's own cap is 100 MB (safetensors, MAX_HEADER_SIZE), of which JSON can make gigabytes.
MAX_HEADER_BYTES = 30_000_000
MAX_INDEX_BYTES = 30_000_000
MAX_TENSORS = 200_000
# The largest tokenizer_config.json known to us (Mistral's, with each of its special tokens) has 0.2 MB.
MAX_JSON_BYTES = foreign_json.MAX_BYTES

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# What is read in advance: enough for a disk to be busy while a block is merged (16 blocks of a MiB).
AHEAD_BYTES = 16 << 20
_GET_A_CLEAN_COPY = "download the model again, or ask who published it for a clean copy"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# What can be read, by its name in torch.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. `dtype` is safetensors' name ("BF16"), `offset` the byte in the file where it begins.

    `file` names the file as its folder does, `opened` is the path behind it: of a hub snapshot a blob.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    opened: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of `model.safetensors`, or of the shards that its index names, sorted by name.

    Raises ModelError when there are no safetensors, a shard is missing or outside the folder, or a header lies.
    """
    if _inside(folder, SINGLE_FILE).is_file():
        return dict(sorted(read_header(folder / SINGLE_FILE).items()))
    if not _inside(folder, INDEX_FILE).is_file():
        raise _no_safetensors(folder)
    weight_map = read_index(folder / INDEX_FILE)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(".safetensors"):
            raise _broken(folder / INDEX_FILE, f"{shard!r} is not a safetensors file")
        opened = _inside(folder, shard)
        if not opened.is_file():
            raise ModelError(f"{folder}: {shard} is missing, but the index names it", "download the missing shard")
        header = read_header(folder / shard, opened)
        if twice := tensors.keys() & header.keys():
            raise _broken(folder / shard, f"tensor {min(twice)} stands in another shard too")
        tensors |= header
    if lost := sorted(name for name, shard in weight_map.items() if name not in tensors):
        raise _broken(folder / weight_map[lost[0]], f"tensor {lost[0]} is not in it, but the index says so")
    return dict(sorted(tensors.items()))


def read_index(file: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name to file name. The file names are not to be trusted yet."""
    weight_map = load_json(file, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise _broken(file, f"no weight_map of 1 to {MAX_TENSORS:,} tensors")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _broken(file, "weight_map holds something else than file names")
    return weight_map


def read_header(file: Path, opened: Path | None = None) -> dict[str, TensorEntry]:
    """Name to place of every tensor in one safetensors file, from its header alone. `opened` is where `file` leads to.

    Raises ModelError for a file that is cut off, is no safetensors file, is a link out of its folder, or whose header
    is over MAX_HEADER_BYTES, names a tensor twice, or gives ranges that overlap, leave holes, or do not fit dtype,
    shape and file.
    """
    opened = opened or _inside(file.parent, file.name)
    with _open(opened) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if header_bytes > MAX_HEADER_BYTES or header_bytes < 2 or 8 + header_bytes > size:
            raise _not_safetensors(file, head, size)
        text = stream.read(header_bytes)
    try:
        header = foreign_json.parse_object(text, str(file))
    except foreign_json.ForeignFileError as error:
        raise ModelError(str(error), _GET_A_CLEAN_COPY) from error
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _broken(file, f"{len(header):,} tensors")
    end = start = 8 + header_bytes
    tensors = {name: _entry((file, opened), name, value, start) for name, value in header.items()}
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _lie(file, name, "overlaps another tensor or leaves a hole")
        end += entry.nbytes
    if end != size:
        short_or_long = "is cut off" if end > size else "has bytes that no tensor owns"
        raise _broken(file, f"{short_or_long} ({size:,} bytes, the header tells of {end:,})")
    return tensors


def read_tensor(
    entry: TensorEntry, rows: tuple[int, int] | None = None, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor in memory of its own, or its rows `rows[0]` up to `rows[1]` (not included) of the first dimension.

    `memory`: bytes to read it into instead, at least as many as it has.
    """
    with _open(entry.opened) as stream:
        return _read(entry, stream, rows, memory)


def read_ahead(
    entry: TensorEntry,
    spans: Sequence[tuple[int, int]],
    see: Callable[[torch.Tensor], None] | None = None,
    cache: LeftAsFound | None = None,
) -> Generator[torch.Tensor, None, None]:
    """The rows of each of `spans`, in memory of their own, as `read_tensor` gives them.

    The file is opened once, and a thread reads about AHEAD_BYTES of what comes next while the rows before are used; it
    ends with the iterator. It calls `see` with the rows that it has read, before anybody else has them. With `cache`
    nothing of them stays in the page cache that was not there.
    """
    row_bytes = entry.nbytes // max(1, entry.shape[0])

    def read(stream: IO[bytes], span: tuple[int, int]) -> torch.Tensor:
        rows = _read(entry, stream, span, None)
        if cache is not None:
            cache.leave(stream, *(entry.offset + row * row_bytes for row in span))
        if see is not None:
            see(rows)
        return rows

    with _open(entry.opened) as stream:
        if cache is not None:
            cache.see(stream)
        if len(spans) < 2:
            yield from (read(stream, span) for span in spans)
            return
        largest = max(end - start for start, end in spans) * row_bytes
        reads: deque[Future[torch.Tensor]] = deque()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice what the system reads ahead
        thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        try:
            for span in spans:
                reads.append(thread.submit(read, stream, span))
                if len(reads) > AHEAD_BYTES // max(1, largest):
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def _read(
    entry: TensorEntry, stream: IO[bytes], rows: tuple[int, int] | None, memory: torch.Tensor | None
) -> torch.Tensor:
    import torch

    shape, offset = entry.shape, entry.offset
    if rows is not None:
        offset += rows[0] * (entry.nbytes // max(1, entry.shape[0]))
        shape = (rows[1] - rows[0], *entry.shape[1:])
    if entry.dtype not in TORCH_DTYPES:
        what = f"a tensor that the model takes is stored as {entry.dtype}, which cannot be computed with"
        raise _broken(entry.file, what)
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    if memory is None:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        tensor = memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    _fill(entry, stream, offset, as_bytes(tensor))
    return tensor


def read_file(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file. Raises ModelError as `read_header` does, and for what is not finite."""
    entries = read_header(file)
    tensors = {name: read_tensor(entry) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        refuse_not_finite(name, entries[name], tensor)
    return tensors


def refuse_not_finite(name: str, entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Raises ModelError for NaN, infinity, and what bf16 cannot hold, which the model would have as infinity."""
    import torch

    if entry.dtype not in FLOAT_DTYPES or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # NaN goes through both
    if not (torch.finfo(torch.bfloat16).min <= float(low) and float(high) <= torch.finfo(torch.bfloat16).max):
        raise _broken(entry.file, f"tensor {name!r} holds values that are not finite (NaN or infinity)")


def read_spans(entry: TensorEntry, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Pieces of a tensor's bytes, each `(offset in the tensor, bytes)`."""
    pieces = [bytearray(count) for _, count in spans]
    with _open(entry.opened) as stream:
        if hasattr(os, "posix_fadvise"):  # Linux would read up to 128 KiB on behind each of them
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for (start, _), piece in zip(spans, pieces, strict=True):
            _fill(entry, stream, entry.offset + start, memoryview(piece))
    return [bytes(piece) for piece in pieces]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def load_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a stranger's file, which may be a link inside its folder only. Raises ModelError."""
    try:
        return foreign_json.load_object(_inside(file.parent, file.name), max_bytes, shown=file)
    except foreign_json.ForeignFileError as error:
        raise ModelError(str(error), _GET_A_CLEAN_COPY) from error


def _open(path: Path) -> IO[bytes]:
    try:
        return files.open_to_read(path)
    except files.UnsafePathError as error:
        raise ModelError(str(error), _GET_A_CLEAN_COPY) from error
    except OSError as error:
        what = f"{path}: cannot be read any more ({error.strerror or error})"
        raise ModelError(what, "put the base's file back, and start again") from error


def _fill(entry: TensorEntry, stream: IO[bytes], offset: int, view: memoryview) -> None:
    file = stream.raw  # type: ignore[attr-defined]  # a buffer would copy, and read more than is asked for
    file.seek(offset)
    while view:
        count = file.readinto(view)
        if not count:
            raise _broken(entry.file, "ends before its tensors do")
        view = view[count:]


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _entry(place: tuple[Path, Path], name: str, value: Any, start: int) -> TensorEntry:
    file, opened = place
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _lie(file, name, "has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _lie(file, name, f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > 16 or not _counts(offsets) or len(offsets) != 2:
        raise _lie(file, name, "has a shape or offsets that are no counts")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (offsets[1] - offsets[0]) * 8 != bits:
        raise _lie(file, name, f"has {offsets[1] - offsets[0]:,} bytes, but {dtype} {shape} needs {bits // 8:,}")
    return TensorEntry(file, dtype, tuple(shape), start + offsets[0], bits // 8, opened)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _inside(folder: Path, name: str) -> Path:
    try:
        return files.inside(folder, name)
    except files.UnsafePathError as error:
        hint = "a base may only name files of its own folder; do not use this one"
        raise ModelError(f"{folder}: {error}", hint) from error


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(f"{file}: {what}", _GET_A_CLEAN_COPY)


def _lie(file: Path, name: str, what: str) -> ModelError:
    return _broken(file, f"tensor {name[:120]!r} {what}")


def _not_safetensors(file: Path, head: bytes, size: int) -> ModelError:
    if head.startswith(PICKLE_MAGICS):
        what = "is a pickle under another name, and pickles are never opened"
    elif head.startswith(b"version "):
        what = "is a Git LFS pointer, not the file itself"
    else:
        what = f"is cut off or no safetensors file ({size:,} bytes)"
    return _broken(file, what)


def _no_safetensors(folder: Path) -> ModelError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_ENDINGS)
    if pickles:
        what = f"has its weights as pickle only ({pickles[0]}), which can run code when opened"
        hint = "use a revision with model.safetensors, or convert the weights where you trust them"
    elif any(folder.glob("*.gguf")):
        what = "has its weights as GGUF, which is for running a model, not for training one"
        hint = "name the original model, with model.safetensors"
    else:
        what = f"no model.safetensors and no {INDEX_FILE}"
        hint = "name the folder that holds the base's weights as safetensors"
    return ModelError(f"{folder}: {what}", hint)
