"""A merged model as a folder that transformers and everything around it opens: safetensors shards, index, config.

Shards are written as they are merged: the header of a shard follows from shapes alone, so it goes first and the weights
are appended block by block (https://github.com/huggingface/safetensors#format). Config, tokenizer and generation
config are the base's own files, byte for byte, but for what the merge changes: transformers 5 would rewrite them in a
way that version 4 reads as another model.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora import disk
from qlora.errors import ExportError
from qlora.events import Progress, Sink
from qlora.export.merge import Merge, MergedTensor, is_multimodal
from qlora.model.blueprint import draw
from qlora.model.hub import BaseFolder
from qlora.model.tensors import INDEX_FILE, SINGLE_FILE, read_header
from qlora.model.tokenizer import copy_tokenizer

SHARD_BYTES = 5_000_000_000  # the hub's own default (huggingface_hub, MAX_SHARD_SIZE)
DTYPE_NAMES = {
    torch.bfloat16: ("BF16", "bfloat16"),
    torch.float16: ("F16", "float16"),
    torch.float32: ("F32", "float32"),
}
SPARE_BYTES = 64 << 20  # config, tokenizer, index


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    format: str
    bytes: int
    tensors: int
    merged_modules: int
    merge_base: str


def write(merge: Merge, out: Path, sink: Sink) -> Exported:
    """Merge into the folder `out`, which appears in one rename when all of it is there and reopened.

    Raises ExportError when the disk is too small or a reopened shard is not what was meant to be written.
    """
    tensors = merge.tensors()
    sizes = [_nbytes(tensor, merge.dtype) for tensor in tensors]
    total = sum(sizes)
    free = disk.free_bytes(out.parent)
    if free < total + SPARE_BYTES:
        raise ExportError(
            f"{out}: needs {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            "free some space, or name another disk with --out",
        )
    shards = _plan_shards(tensors, sizes)

    def fill(folder: Path) -> None:
        done = 0
        for name, members in shards.items():
            done = _write_shard(folder / name, members, merge.dtype, (done, total), sink)
        if len(shards) > 1:
            _write_index(folder, shards, total)
        _write_companions(folder, merge)
        _reopen(folder, shards)

    size = disk.publish_folder(out, fill)
    trained = len(merge.adapter.lora) + len(merge.adapter.whole)
    return Exported(out, "hf", size, len(tensors), trained, merge.merge_base)


def _nbytes(tensor: MergedTensor, dtype: torch.dtype) -> int:
    return int(torch.Size(tensor.shape).numel()) * dtype.itemsize


def _plan_shards(tensors: Sequence[MergedTensor], sizes: Sequence[int]) -> dict[str, list[MergedTensor]]:
    """Tensors by file name, in order, at most SHARD_BYTES a file unless one tensor alone is larger."""
    groups: list[list[MergedTensor]] = [[]]
    filled = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(
    path: Path, tensors: Sequence[MergedTensor], dtype: torch.dtype, progress: tuple[int, int], sink: Sink
) -> int:
    """One file: header, then each tensor's blocks. Returns the bytes done of the whole export."""
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
    done, total = progress
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for block in tensor.blocks():
                raw = block.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
                file.write(raw.data)
                done += raw.nbytes
                sink.emit(Progress("merge", done, total, "bytes"))
    return done


def _write_index(folder: Path, shards: dict[str, list[MergedTensor]], total: int) -> None:
    weight_map = {tensor.name: name for name, members in shards.items() for tensor in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    disk.write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_companions(folder: Path, merge: Merge) -> None:
    """Config, generation config, licence, and from the adapter's folder the tokenizer and template of the training."""
    base = merge.base.path
    disk.write_atomic(folder / "config.json", patched_config(merge))
    for path in sorted(base.iterdir()):
        if path.is_file() and (path.name == "generation_config.json" or path.name.startswith(("LICENSE", "NOTICE"))):
            shutil.copyfile(path, folder / path.name)
    trained_with = merge.adapter.folder
    copy_tokenizer(trained_with if (trained_with / "tokenizer_config.json").is_file() else base, folder, None)
    (folder / "README.md").write_text(card(merge), encoding="utf-8")


def card(merge: Merge) -> str:
    """The merged model's card: the adapter's own text under a header that says what was merged into what."""
    held = {"nf4": "its weights as 4-bit training saw them (dequantized)", "full": "its original weights"}
    own = merge.adapter.folder / "README.md"
    text = own.read_text(encoding="utf-8").split("---\n", 2)[-1].strip() if own.is_file() else ""
    return f"""---
base_model: {merge.base.name}
library_name: transformers
tags: [qlora, merged]
---

# {Path(merge.base.name).name} with a LoRA adapter merged in

Made from {merge.base.name}, {held[merge.merge_base]}, and {len(merge.adapter.lora)} trained modules added to them.

{text}
"""


def patched_config(merge: Merge) -> str:
    """The base's config.json as text: byte for byte when nothing changed, else with the changed keys alone."""
    original = (merge.base.path / "config.json").read_text(encoding="utf-8")
    config = json.loads(original)
    patched = _text_config(merge.base) if is_multimodal(merge.base) else dict(config)
    name = DTYPE_NAMES[merge.dtype][1]
    present = [key for key in ("torch_dtype", "dtype") if key in patched] or ["torch_dtype"]
    patched.update(dict.fromkeys(present, name))
    patched.pop("quantization_config", None)
    return original if patched == config else json.dumps(patched, indent=2, ensure_ascii=False) + "\n"


def _text_config(base: BaseFolder) -> dict[str, Any]:
    """The config of a multimodal base's text model: its own section, with what the whole says for all parts."""
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
    whole = {key: base.config[key] for key in shared if key in base.config}
    return {**whole, **base.config["text_config"], "architectures": [type(draw(base).model).__name__]}


def _reopen(folder: Path, shards: dict[str, list[MergedTensor]]) -> None:
    """Read every header back: names and shapes are those that were meant, and the files are whole."""
    for name, members in shards.items():
        written = {key: entry.shape for key, entry in read_header(folder / name).items()}
        if written != {tensor.name: tensor.shape for tensor in members}:
            raise ExportError(f"{folder / name}: reopened, it holds other tensors than were written", "export again")
