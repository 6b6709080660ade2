"""The tensors of a folder of safetensors files: found, checked and read by ourselves.

A base comes from a stranger. Its index names files and its headers name byte ranges, so every name and number is
checked before it is used: names through `disk.inside`, ranges against the file's size, without torch and without
reading any weight. The layout is the safetensors format's own: 8 bytes (little endian) with the header's length, the
header as JSON, then the data without holes (https://github.com/huggingface/safetensors#format). Tensors are read by
offset into memory of our own, in rows where wanted; no file stays open or mapped in between.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.disk import inside
from qlora.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# How pickles begin: torch's zip, and pickle's own protocols 2 to 5.
PICKLE_MAGICS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# The format's own cap on a header: safetensors, MAX_HEADER_SIZE.
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_TENSORS = 1_000_000

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
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
    """Where a tensor lies. `dtype` is safetensors' name ("BF16"), `offset` the byte in `file` where it begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of `model.safetensors`, or of the shards that its index names, sorted by name.

    Raises ModelError when there are no safetensors, a shard is missing or outside the folder, or a header lies.
    """
    if (folder / SINGLE_FILE).is_file():
        return dict(sorted(read_header(_inside(folder, SINGLE_FILE)).items()))
    if not (folder / INDEX_FILE).is_file():
        raise _no_safetensors(folder)
    weight_map = read_index(_inside(folder, INDEX_FILE))
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(".safetensors"):
            raise _broken(folder / INDEX_FILE, f"{shard!r} is not a safetensors file")
        file = _inside(folder, shard)
        if not file.is_file():
            raise ModelError(f"{folder}: {shard} is missing, but the index names it", "download the missing shard")
        header = read_header(file)
        if twice := tensors.keys() & header.keys():
            raise _broken(file, f"tensor {min(twice)} stands in another shard too")
        tensors |= header
    if lost := sorted(name for name, shard in weight_map.items() if name not in tensors):
        raise _broken(folder / weight_map[lost[0]], f"tensor {lost[0]} is not in it, but the index says so")
    return dict(sorted(tensors.items()))


def read_index(file: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name to file name. The file names are not to be trusted yet."""
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise _broken(file, f"an index of {file.stat().st_size:,} bytes")
    weight_map = load_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise _broken(file, f"no weight_map of 1 to {MAX_TENSORS:,} tensors")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _broken(file, "weight_map holds something else than file names")
    return weight_map


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Name to place of every tensor in one safetensors file, from its header alone.

    Raises ModelError for a file that is cut off, is no safetensors file, or whose header is over 100 MB, names a tensor
    twice, or gives ranges that overlap, leave holes, or do not fit dtype, shape and file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if header_bytes > MAX_HEADER_BYTES or header_bytes < 2 or 8 + header_bytes > size:
            raise _not_safetensors(file, head, size)
        text = stream.read(header_bytes)
    header = _parse_json(text, file)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _broken(file, f"{len(header):,} tensors")
    end = start = 8 + header_bytes
    tensors = {name: _entry(file, name, value, start) for name, value in header.items()}
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _lie(file, name, "overlaps another tensor or leaves a hole")
        end += entry.nbytes
    if end != size:
        short_or_long = "is cut off" if end > size else "has bytes that no tensor owns"
        raise _broken(file, f"{short_or_long} ({size:,} bytes, the header tells of {end:,})")
    return tensors


def read_tensor(entry: TensorEntry, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """The tensor in memory of its own, or its rows `rows[0]` up to `rows[1]` (not included) of the first dimension."""
    import torch

    shape, offset = entry.shape, entry.offset
    if rows is not None:
        offset += rows[0] * (entry.nbytes // max(1, entry.shape[0]))
        shape = (rows[1] - rows[0], *entry.shape[1:])
    tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while view:
            count = stream.readinto(view)
            if not count:
                raise _broken(entry.file, "ends before its tensors do")
            view = view[count:]
    return tensor


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that a stranger wrote. Raises ModelError for anything else, and for doubled keys."""
    return _parse_json(file.read_bytes(), file)


def total_bytes(entries: Iterable[TensorEntry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _entry(file: Path, name: str, value: Any, start: int) -> TensorEntry:
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
    return TensorEntry(file, dtype, tuple(shape), start + offsets[0], bits // 8)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _inside(folder: Path, name: str) -> Path:
    try:
        return inside(folder, name)
    except ValueError as error:
        hint = "a base may only name files of its own folder; do not use this one"
        raise ModelError(f"{folder}: {error}", hint) from error


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return keys

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _broken(file, f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(file, "holds no JSON object")
    return value


def _broken(file: Path, what: str) -> ModelError:
    return ModelError(f"{file}: {what}", "download the model again, or ask who published it for a clean copy")


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
