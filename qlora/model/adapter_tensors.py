"""The tensors of an adapter's file, by what they are: low-rank matrices, whole weights, single token rows.

Each is named as `weight_names` makes one name of all that tools write. What belongs to another part of a multimodal
model than its text model has no place in an export, which is that model alone: it is left out where it never moved
(libraries put adapters on every layer called q_proj, the vision tower's too), and refused by name where it did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora import files
from qlora.errors import ExportError
from qlora.model import adapter_config
from qlora.model.adapter_config import shown
from qlora.model.tensors import FLOAT_DTYPES, TensorEntry, read_header, read_tensor
from qlora.model.weight_names import adapter_name, other_part, stored_name

ADAPTER_FILE = "adapter_model.safetensors"
# A 405B model with adapters on every layer has 1,764 tensors, whose header takes 0.3 MB.
MAX_TENSORS = 50_000
MAX_HEADER_BYTES = 8_000_000
_CLEAN_COPY = "get a clean copy of the adapter"

# What stands behind a module's name, in peft's files.
_ROLES = (
    ("a", re.compile(r"\.lora_A\.weight$")),
    ("b", re.compile(r"\.lora_B\.weight$")),
    ("embedding_a", re.compile(r"\.lora_embedding_A$")),
    ("embedding_b", re.compile(r"\.lora_embedding_B$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector$")),
    ("rows", re.compile(r"\.token_adapter\.trainable_tokens_delta$")),
)
_UNDER = re.compile(r"\.(?:token_adapter\.)?(?:base_layer|original_module)(?=\.\w+$)")
_TRAINED = re.compile(r"\.modules_to_save(?:\.\w+)?(?=\.\w+$)")


@dataclass(frozen=True)
class AdapterTensors:
    """What a file holds. Names are the causal model's.

    roles   by role ("a", "b", "embedding_a", "embedding_b", "magnitude", "rows"), by module
    whole   weights that take the place of the base's, by parameter
    under   weights that adapters sit on, by parameter
    all     every tensor, by the name that peft gives it for an adapter on the causal model, without its prefix
    stored  of each module its name in the file, which patterns in the configuration mean
    idle    modules of other parts of the model whose adapters never moved; nothing else names them
    """

    roles: Mapping[str, dict[str, TensorEntry]]
    whole: Mapping[str, TensorEntry]
    under: Mapping[str, TensorEntry]
    all: Mapping[str, TensorEntry]
    stored: Mapping[str, str]
    idle: tuple[str, ...]


def read_tensors(folder: Path) -> AdapterTensors:
    """Open an adapter's file; of values, only those of matrices on other parts are read. Raises ExportError."""
    file = folder / ADAPTER_FILE
    named: dict[str, TensorEntry] = {}
    elsewhere: dict[str, TensorEntry] = {}
    stored: dict[str, str] = {}
    for in_file, entry in _header(folder).items():
        name = adapter_name(in_file)
        if entry.dtype not in FLOAT_DTYPES:
            what = f"{file}: {shown(name)} is stored as {entry.dtype}"
            raise ExportError(what, "save the adapter from a 16-bit base")
        kind = elsewhere if other_part(name) else named
        if name in kind:
            raise ExportError(f"{file}: {shown(name)} is there twice ({shown(in_file)})", "save one adapter alone")
        kind[name] = entry
        stored[name] = stored_name(in_file)
    roles: dict[str, dict[str, TensorEntry]] = {role: {} for role, _ in _ROLES}
    whole: dict[str, TensorEntry] = {}
    copies: dict[str, TensorEntry] = {}
    under: dict[str, TensorEntry] = {}
    modules: dict[str, str] = {}
    for name, entry in named.items():
        kind, key = whole, name
        found = next(((role, match.start()) for role, pattern in _ROLES if (match := pattern.search(name))), None)
        if found:
            kind, key = roles[found[0]], name[: found[1]]
            modules[key] = re.split(r"\.(?:lora_|token_adapter\.)", stored[name])[0]
        elif _UNDER.search(name):
            kind, key = under, _UNDER.sub("", name)
        elif _TRAINED.search(name):
            kind, key = copies, _TRAINED.sub("", name)
        if key in kind:
            raise ExportError(f"{file}: {shown(key)} is there twice ({shown(name)})", "save one adapter alone")
        kind[key] = entry
    _check_pairs(roles, file)
    whole = {**copies, **whole}  # where both stand in a file, peft loads the plain name
    under = {name: entry for name, entry in under.items() if name not in whole}
    every = {name: entry for name, entry in named.items() if not _TRAINED.search(name)} | whole
    return AdapterTensors(roles, whole, under, every, modules, _idle(elsewhere, file))


def _header(folder: Path) -> dict[str, TensorEntry]:
    """The tensors by their names in the file, as many as an adapter can have."""
    file = folder / ADAPTER_FILE
    try:
        resolved = files.inside(folder, ADAPTER_FILE)
        with files.open_to_read(resolved) as stream:
            size = int.from_bytes(stream.read(8), "little")
    except files.UnsafePathError as error:
        raise ExportError(f"{folder}: {error}", "do not use this adapter; get a clean copy of it") from error
    if MAX_HEADER_BYTES < size <= resolved.stat().st_size:
        raise ExportError(f"{file}: a header of {size:,} bytes is no adapter's", _CLEAN_COPY)
    entries = read_header(resolved)
    if len(entries) > MAX_TENSORS:
        raise ExportError(f"{file}: {len(entries):,} tensors are no adapter's", _CLEAN_COPY)
    if long := next((name for name in entries if len(name) > adapter_config.MAX_NAME), None):
        what = f"{file}: the tensor {shown(long)} has a name of {len(long):,} characters"
        raise ExportError(what, _CLEAN_COPY)
    return entries


def _check_pairs(roles: Mapping[str, Mapping[str, TensorEntry]], file: Path) -> None:
    """Every B and every magnitude has its A, and one of a kind."""
    first = {**roles["a"], **roles["embedding_a"]}
    pairs = (("b", roles["a"]), ("embedding_b", roles["embedding_a"]), ("magnitude", first))
    for module in (module for role, of_a in pairs for module in roles[role] if module not in of_a):
        raise ExportError(f"{file}: {shown(module)} has no lora_A", "save the adapter again")
    if both := sorted(roles["a"].keys() & roles["embedding_a"].keys()):
        raise ExportError(f"{file}: {shown(both[0])} has two kinds of lora_A", "save the adapter again")


def _idle(elsewhere: Mapping[str, TensorEntry], file: Path) -> tuple[str, ...]:
    """The modules of other parts whose matrices never moved: B is zero, as every start makes it.

    Raises ExportError where one did, or was trained whole.
    """
    modules, moved = set(), set()
    for name, entry in elsewhere.items():
        module = name.partition(".lora_")[0]
        modules.add(module)
        is_second = _ROLES[1][1].search(name) is not None
        if module == name or (is_second and bool(read_tensor(entry).any())):
            moved.add(module)
    if moved:
        parts = Counter(str(other_part(module)) for module in moved)
        named = " and ".join(f"{count} modules of its {shown(part)}" for part, count in sorted(parts.items()))
        what = f"{file}: was trained on {named} ({shown(min(moved))}), and an export is the text model alone"
        raise ExportError(what, "use this adapter through peft, or train it on the text model's layers alone")
    return tuple(sorted(modules))
