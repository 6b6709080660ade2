"""A merged model as a folder that transformers and everything around it opens: safetensors shards, index, config.

Shards are written as they are merged: the header of a shard follows from shapes alone, so it goes first and the weights
are appended block by block (https://github.com/huggingface/safetensors#format). Config, tokenizer and generation
config are the base's own files, byte for byte, but for what the merge changes, and for what transformers 5 alone reads.

A base that version 5 has saved holds its rotary positions as `rope_parameters` only: version 4.57 then takes theta
10,000 and no scaling in silence, and is another model (logits off by 3 to 5 on five tiny ones). Its tokenizer is
of a class that version 4 does not know. The old keys are added and the new ones stay: both versions then read the same.
What the hub's bases hold, saved by version 4, is not touched.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from qlora import disk, files, foreign_json
from qlora.errors import ExportError
from qlora.events import Notice, Progress, Sink
from qlora.export.merge.merge import Merge, MergedTensor
from qlora.export.staging import StagedExport
from qlora.export.version4 import READS_ROPE_THETA
from qlora.foreign_json import ForeignFileError
from qlora.model.tensors import INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, read_header
from qlora.model.tokenizer_files import of_export, without_paths
from qlora.model.weight_names import other_part

MAX_END_IDS = 1_000
MAX_COPIED_BYTES = 10_000_000
_CLEAN_COPY = "get a clean copy of the base"
SHARD_BYTES = 5_000_000_000  # the hub's own default (huggingface_hub, MAX_SHARD_SIZE)
DTYPE_NAMES = {
    torch.bfloat16: ("BF16", "bfloat16"),
    torch.float16: ("F16", "float16"),
    torch.float32: ("F32", "float32"),
    torch.uint8: ("U8", "uint8"),  # experts in MXFP4, as they were published
}
# Of rope_parameters, what version 4 does not look for in rope_scaling.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def planned_bytes(merge: Merge) -> int:
    """Bytes of weights that `fill` will write."""
    return sum(map(_nbytes, merge.tensors()))


def fill(merge: Merge, staged: StagedExport, sink: Sink) -> int:
    """Merge into the product "hf" of `staged`: shards, index and companions, reopened. Returns the tensors written.

    The product is not published, and its card is left to the caller. Raises ExportError when a reopened shard is not
    what was meant to be written.
    """
    shards = _plan_shards(merge.tensors())
    total = sum(_nbytes(tensor) for members in shards.values() for tensor in members)
    item = done = 0
    for name, members in shards.items():
        for tensor in members:
            item += 1
            size = _nbytes(tensor)
            if item > staged.start:
                if tensor is members[0]:
                    staged.append("hf", name, _header(members))
                with closing(tensor.blocks(1)) as blocks:
                    for block in blocks:
                        staged.append("hf", name, block.contiguous().reshape(-1).view(torch.uint8).numpy())
                        sink.emit(Progress("merge", done, total, "bytes"))
                staged.checkpoint(item)
            done += size
    sink.emit(Progress("merge", done, total, "bytes"))
    folder = staged.folder("hf")
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, members in shards.items() for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        disk.write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    _write_companions(folder, merge, sink)
    _say_what_is_left_out(merge, sink)
    _reopen(folder, shards)
    return item


def _say_what_is_left_out(merge: Merge, sink: Sink) -> None:
    """Of a multimodal base, whose text model alone is merged and written."""
    taken = {source.tensor for source in merge.plan.base.values()}
    rest = [name for name in merge.base.tensors if name not in taken and other_part(name)]
    if rest:
        parts = " and ".join(sorted({str(other_part(name)) for name in rest}))
        message = f"the base's text model alone is written, as {merge.plan.architecture}; its {parts} are left out"
        sink.emit(Notice("export", message, len(rest)))


def add_stop_token(folder: Path, end_ids: Sequence[int], sink: Sink) -> None:
    """Let a folder of safetensors stop where training taught it to: at the first of `end_ids`, the turn's own end.

    transformers stops at generation_config.json's ids alone (config.json's where there is no such file). A base whose
    own do not name the trained end would never stop; it is added to them.
    """
    file = folder / "generation_config.json"
    try:
        generation = foreign_json.load_object(file) if file.is_file() else {}
        config = foreign_json.load_object(folder / "config.json")
    except ForeignFileError as error:
        raise ExportError(str(error), _CLEAN_COPY) from error
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(ids) > MAX_END_IDS or not all(type(number) is int for number in ids):
        what = f"{file}: eos_token_id is wrong: no token id, nor a list of them (it is {str(eos)[:60]})"
        raise ExportError(what, _CLEAN_COPY)
    if not end_ids or (end := end_ids[0]) in ids:
        return
    generation["eos_token_id"] = [end, *ids]
    disk.write_atomic(file, json.dumps(generation, indent=2) + "\n")
    message = f"the trained answers end with token {end}, which the base does not stop at: added to its end tokens"
    sink.emit(Notice("export", message))


def _nbytes(tensor: MergedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _plan_shards(tensors: Sequence[MergedTensor]) -> dict[str, list[MergedTensor]]:
    """Tensors by file name, in order, at most SHARD_BYTES a file unless one tensor alone is larger."""
    groups: list[list[MergedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(tensor)
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _header(tensors: Sequence[MergedTensor]) -> bytes:
    """What a shard begins with: names, shapes and places of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _nbytes(tensor)
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _write_companions(folder: Path, merge: Merge, sink: Sink) -> None:
    """Config, generation config, licence, and from the adapter's folder the tokenizer and template of the training."""
    base = merge.base.path
    disk.write_atomic(folder / "config.json", patched_config(merge))
    for name in sorted(path.name for path in base.iterdir()):
        if name == "generation_config.json" or name.startswith(("LICENSE", "NOTICE")):
            _copy(base, name, folder)
    if (generation := folder / "generation_config.json").is_file():
        _, values = _read_object(folder, generation.name)
        rows = merge.text_config().get("vocab_size")
        if (kept := without_stray_padding(values, rows)) != values:
            disk.write_atomic(generation, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    trained_with = merge.adapter.folder
    has_tokenizer = (trained_with / "tokenizer_config.json").is_file()
    if merge.vocabulary_resized and not has_tokenizer:
        what = "the adapter resized the vocabulary and brings no tokenizer: the base's is written"
        sink.emit(Notice("export", f"{what}, without the new tokens"))
    of_export(base, trained_with).deliver(folder)
    if (tokenizer_config := folder / "tokenizer_config.json").is_file():
        disk.write_atomic(tokenizer_config, patched_tokenizer_config(tokenizer_config))


def _copy(base: Path, name: str, folder: Path) -> None:
    """A small file of the base as it is; a folder is left out. Raises ExportError for a link out of it."""
    try:
        if (file := files.inside(base, name)).is_file():
            (folder / name).write_bytes(files.read_bytes(file, MAX_COPIED_BYTES))
    except files.UnsafePathError as error:
        raise ExportError(f"{base}: {name} is not copied into an export: {error}", _CLEAN_COPY) from error


def patched_config(merge: Merge) -> str:
    """The base's config.json as text: byte for byte when nothing changed, else with the changed keys alone."""
    original, config = _read_object(merge.base.path, "config.json")
    patched = without_paths(config_for_both(merge.text_config()))
    patched = without_stray_padding(patched, patched.get("vocab_size"))
    present = [key for key in ("torch_dtype", "dtype") if key in patched] or ["torch_dtype"]
    patched.update(dict.fromkeys(present, DTYPE_NAMES[merge.dtype][1]))
    return original if patched == config else json.dumps(patched, indent=2, ensure_ascii=False) + "\n"


def patched_tokenizer_config(file: Path) -> str:
    """A tokenizer_config.json as text: byte for byte, but for what transformers 4 could not read, and for paths."""
    original, config = _read_object(file.parent, file.name)
    patched = without_paths(tokenizer_config_for_both(config))
    return original if patched == config else json.dumps(patched, indent=2, ensure_ascii=False) + "\n"


def _read_object(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    """A JSON object as it stands in a file of a base or adapter, and its values, of one reading. Raises ExportError."""
    try:
        data = files.read_bytes(files.inside(folder, name), MAX_JSON_BYTES)
        return data.decode(json.detect_encoding(data)), foreign_json.parse_object(data, str(folder / name))
    except (OSError, ValueError) as error:  # UnsafePathError and ForeignFileError are such
        raise ExportError(f"{folder / name}: cannot be read any more ({error})", _CLEAN_COPY) from error


def without_stray_padding(config: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """A configuration without a pad_token_id that none of the embedding's `rows` is: transformers opens no such model.

    Community models have one where a pad token was added to the tokenizer alone (torch.nn.Embedding asserts it).
    """
    pad = config.get("pad_token_id")
    stray = type(pad) is int and type(rows) is int and not -rows <= pad < rows
    return {key: value for key, value in config.items() if key != "pad_token_id" or not stray}


def config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `rope_theta` and `rope_scaling` beside `rope_parameters`, where these are missing.

    Only of a type that version 4 knows (see `version4`): others have no place for them.
    """
    rope = config.get("rope_parameters")
    if config.get("model_type") not in READS_ROPE_THETA or not isinstance(rope, Mapping) or "rope_theta" in config:
        return dict(config)
    old: dict[str, Any] = {}
    main = rope
    if isinstance(rope.get("full_attention"), Mapping):  # Gemma 3: sliding layers have a theta of their own
        main = rope["full_attention"]
        local = rope.get("sliding_attention")
        if isinstance(local, Mapping) and "rope_theta" in local:
            old["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" not in main:
        return dict(config)
    old |= {key: main[key] for key in _BESIDE_SCALING if key in main}
    old["rope_scaling"] = _scaling(main)
    return {**config, **{key: value for key, value in old.items() if key not in config}}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    # Phi-3's configuration in version 4 takes these three keys and no other.
    if kind == "longrope" and {"short_factor", "long_factor"} <= rope.keys():
        return {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {key: value for key, value in rope.items() if key not in _BESIDE_SCALING}


def tokenizer_config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class and a key for further special tokens that version 4 knows too."""
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = changed.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 takes a mapping under this name
        changed.setdefault("additional_special_tokens", extra)
        del changed["extra_special_tokens"]
    return changed


def _reopen(folder: Path, shards: dict[str, list[MergedTensor]]) -> None:
    """Read every header back: names and shapes are those that were planned, and the files are complete."""
    for name, members in shards.items():
        written = {key: entry.shape for key, entry in read_header(folder / name).items()}
        if written != {tensor.name: tensor.shape for tensor in members}:
            raise ExportError(f"{folder / name}: reopened, it holds other tensors than were written", "export again")
