"""A merged model as a folder that transformers and everything around it opens: safetensors shards, index, config.

Shards are written as they are merged: the header of a shard follows from shapes alone, so it goes first and the weights
are appended block by block (https://github.com/huggingface/safetensors#format). Config, tokenizer and generation
config are the base's own files, byte for byte, but for what the merge changes: transformers 5 would rewrite them in a
way that version 4 reads as another model.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora import disk
from qlora.errors import ExportError
from qlora.events import Notice, Progress, Sink
from qlora.export.merge.merge import Merge, MergedTensor
from qlora.export.staging import StagedExport
from qlora.export.versions import config_for_both, tokenizer_config_for_both
from qlora.model.tensors import INDEX_FILE, SINGLE_FILE, load_json, read_header
from qlora.model.tokenizer import copy_tokenizer

SHARD_BYTES = 5_000_000_000  # the hub's own default (huggingface_hub, MAX_SHARD_SIZE)
DTYPE_NAMES = {
    torch.bfloat16: ("BF16", "bfloat16"),
    torch.float16: ("F16", "float16"),
    torch.float32: ("F32", "float32"),
}


def planned_bytes(merge: Merge) -> int:
    """Bytes of weights that `fill` will write."""
    return sum(_nbytes(tensor, merge.dtype) for tensor in merge.tensors())


def fill(merge: Merge, workshop: StagedExport, sink: Sink) -> int:
    """Merge into the product "hf" of `workshop`: shards, index and companions, reopened. Returns the tensors written.

    The product is not published, and its card is left to the caller. Raises ExportError when a reopened shard is not
    what was meant to be written.
    """
    shards = _plan_shards(merge.tensors(), merge.dtype)
    total = sum(_nbytes(tensor, merge.dtype) for members in shards.values() for tensor in members)
    item = done = 0
    for name, members in shards.items():
        for tensor in members:
            item += 1
            size = _nbytes(tensor, merge.dtype)
            if item > workshop.start:
                if tensor is members[0]:
                    workshop.append("hf", name, _header(members, merge.dtype))
                for block in tensor.blocks(1):
                    workshop.append("hf", name, block.contiguous().reshape(-1).view(torch.uint8).numpy())
                    sink.emit(Progress("merge", done, total, "bytes"))
                workshop.checkpoint(item)
            done += size
    sink.emit(Progress("merge", done, total, "bytes"))
    folder = workshop.folder("hf")
    if len(shards) > 1:
        _write_index(folder, shards, total)
    _write_companions(folder, merge, sink)
    _reopen(folder, shards)
    return item


def write(merge: Merge, out: Path, sink: Sink) -> int:
    """Merge into the folder `out`, which appears in one rename when all of it is there and reopened. Returns its bytes.

    Goes on where an earlier call of the same work was killed. Raises ExportError as `fill` and `StagedExport.open` do.
    """
    with StagedExport.open({"hf": out}, merge.identity(), planned_bytes(merge)) as workshop:
        fill(merge, workshop, sink)
        disk.write_atomic(workshop.folder("hf") / "README.md", card(merge))
        return workshop.publish("hf")


def _nbytes(tensor: MergedTensor, dtype: torch.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _plan_shards(tensors: Sequence[MergedTensor], dtype: torch.dtype) -> dict[str, list[MergedTensor]]:
    """Tensors by file name, in order, at most SHARD_BYTES a file unless one tensor alone is larger."""
    groups: list[list[MergedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(tensor, dtype)
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _header(tensors: Sequence[MergedTensor], dtype: torch.dtype) -> bytes:
    """What a shard begins with: names, shapes and places of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _nbytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write_index(folder: Path, shards: dict[str, list[MergedTensor]], total: int) -> None:
    weight_map = {tensor.name: name for name, members in shards.items() for tensor in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    disk.write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_companions(folder: Path, merge: Merge, sink: Sink) -> None:
    """Config, generation config, licence, and from the adapter's folder the tokenizer and template of the training."""
    base = merge.base.path
    disk.write_atomic(folder / "config.json", patched_config(merge))
    for path in sorted(base.iterdir()):
        if path.is_file() and (path.name == "generation_config.json" or path.name.startswith(("LICENSE", "NOTICE"))):
            shutil.copyfile(path, folder / path.name)
    trained_with = merge.adapter.folder
    has_tokenizer = (trained_with / "tokenizer_config.json").is_file()
    if merge.vocabulary_resized and not has_tokenizer:
        what = (
            "the adapter resized the vocabulary and brings no tokenizer: the base's is written, without the new tokens"
        )
        sink.emit(Notice("export", what))
    copy_tokenizer(trained_with if has_tokenizer else base, folder, None)
    said = folder / "tokenizer_config.json"
    if said.is_file():
        disk.write_atomic(said, patched_tokenizer_config(said))


def card(merge: Merge, extra: str = "") -> str:
    """The merged model's card: the adapter's own text under a header that says what was merged into what.

    `extra` is Markdown that stands between the two.
    """
    held = {"nf4": "its weights as 4-bit training saw them (dequantized)", "full": "its original weights"}
    own = merge.adapter.folder / "README.md"
    text = own.read_text(encoding="utf-8").split("---\n", 2)[-1].strip() if own.is_file() else ""
    sections = "\n\n".join(part for part in (extra.strip(), text) if part)
    return f"""---
base_model: {merge.base.name}
library_name: transformers
tags: [qlora, merged]
---

# {Path(merge.base.name).name} with a LoRA adapter merged in

Made from {merge.base.name}, {held[merge.merge_base]}, and {len(merge.changed)} trained modules added to them.

{sections}
"""


def patched_config(merge: Merge) -> str:
    """The base's config.json as text: byte for byte when nothing changed, else with the changed keys alone."""
    original = (merge.base.path / "config.json").read_text(encoding="utf-8")
    patched = config_for_both(merge.text_config())
    present = [key for key in ("torch_dtype", "dtype") if key in patched] or ["torch_dtype"]
    patched.update(dict.fromkeys(present, DTYPE_NAMES[merge.dtype][1]))
    return original if patched == json.loads(original) else json.dumps(patched, indent=2, ensure_ascii=False) + "\n"


def patched_tokenizer_config(file: Path) -> str:
    """A tokenizer_config.json as text: byte for byte, but for what version 4 of transformers could not read."""
    original = file.read_text(encoding="utf-8")
    config = load_json(file)
    patched = tokenizer_config_for_both(config)
    return original if patched == config else json.dumps(patched, indent=2, ensure_ascii=False) + "\n"


def _reopen(folder: Path, shards: dict[str, list[MergedTensor]]) -> None:
    """Read every header back: names and shapes are those that were meant, and the files are whole."""
    for name, members in shards.items():
        written = {key: entry.shape for key, entry in read_header(folder / name).items()}
        if written != {tensor.name: tensor.shape for tensor in members}:
            raise ExportError(f"{folder / name}: reopened, it holds other tensors than were written", "export again")
