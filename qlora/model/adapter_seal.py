"""Whether an adapter's folder is what was published in it, and stays so while it is read.

A run publishes its adapter with the sha256 of each file. Whoever opens one compares them before a tensor is read, and
again when the work is done: the weights are read in blocks, more than once and in more than one process, and what was
swapped in between must not go out under the name of what was checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora import disk, files, manifest
from qlora.errors import ExportError, UserError
from qlora.events import Notice, Sink, Sinks
from qlora.manifest import Recorded
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, PROVENANCE_FILE
from qlora.model.base_folder import MAX_SMALL_BYTES
from qlora.model.tensors import read_header
from qlora.model.tokenizer_files import TOKENIZER_FILES

# What an adapter computes, and what it is said to be. All else (its card) is for people, who may edit it.
SEALED = (ADAPTER_FILE, ADAPTER_CONFIG, PROVENANCE_FILE, *TOKENIZER_FILES)


_NOT_HASHED = ""  # of a file with another size than it should have: whatever is in it, it is another one


@dataclass(frozen=True)
class AdapterSeal:
    """What stood in an adapter's folder when it was checked, of every file of SEALED that is there."""

    folder: Path
    found: Mapping[str, Recorded]

    def check(self) -> None:
        """Raises ExportError when a file is no longer the one that was checked."""
        if changed := _first_difference(_look(self.folder, SEALED, self.found), self.found):
            what = f"{self.folder / changed}: was replaced while it was being exported"
            raise ExportError(what, "export again, when nothing else writes into that folder")


def seal(folder: Path, sink: Sink) -> AdapterSeal:
    """Check an adapter's folder against its manifest; one without a manifest was made elsewhere, and passes.

    A card that was edited since is a notice. Raises ExportError naming the file when weights, configuration, provenance
    or tokenizer are not as they were published, ModelError for weights that are not as their own header says.
    """
    try:
        recorded = manifest.recorded(folder)
    except (OSError, ValueError) as error:
        if (folder / PROVENANCE_FILE).exists() and not isinstance(error, FileNotFoundError):
            raise _not_as_published(folder, disk.MANIFEST, f"cannot be trusted ({error})") from error
        return _of_unknown(folder, sink)
    found = _look(folder, (*SEALED, *recorded), recorded)
    differing = [name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name)]
    if sealed := sorted(name for name in differing if name in SEALED):
        name = sealed[0]
        verb = "is missing" if name not in found else "was added" if name not in recorded else "was changed"
        why = " (its sha256 or size differs)" if verb == "was changed" else ""
        raise _not_as_published(folder, name, f"{verb} since the adapter was delivered{why}")
    if differing:
        names = ", ".join(sorted(differing))
        message = f"{names} in {folder} was edited or removed since it was delivered; its weights are as trained"
        sink.emit(Notice("adapter", message, len(differing)))
    return AdapterSeal(folder, {name: entry for name, entry in found.items() if name in SEALED})


def _of_unknown(folder: Path, sink: Sink) -> AdapterSeal:
    """Of an adapter without a manifest of ours: made elsewhere, or its owner wants it to be taken as it is."""
    if (folder / ADAPTER_FILE).is_file():
        read_header(folder / ADAPTER_FILE)  # which knows how long the file must be: nothing beyond is hashed
    found = _look(folder, SEALED, {})
    if PROVENANCE_FILE in found:
        message = f"{folder} has no {disk.MANIFEST} any more: whether its files are as trained is not known"
        sink.emit(Notice("adapter", message))
    return AdapterSeal(folder, found)


def damage(folder: Path) -> str | None:
    """What of a delivered adapter is not as it was published, in words; None where it can be used."""
    try:
        found = seal(folder, Sinks()).found
    except UserError as error:
        return error.what
    return None if ADAPTER_FILE in found else f"{folder} holds no {ADAPTER_FILE}"


def _not_as_published(folder: Path, name: str, what: str) -> ExportError:
    hint = (
        "put the file back, or let the run deliver it again with mode='resume'; "
        f"if you changed it on purpose, remove {disk.MANIFEST} there, and it is taken as it is"
    )
    return ExportError(f"{folder / name}: {what}", hint)


def _first_difference(one: Mapping[str, Recorded], other: Mapping[str, Recorded]) -> str | None:
    return min((name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), default=None)


def _look(folder: Path, names: Iterable[str], expected: Mapping[str, Recorded]) -> dict[str, Recorded]:
    """Size and sha256 of the files that are there; what has another size than expected is not read.

    Raises ExportError for what is no plain file of the folder, or too large for what it is.
    """
    found = {}
    for name in dict.fromkeys(names):
        known = expected.get(name)
        most = None if known or name == ADAPTER_FILE else MAX_SMALL_BYTES
        try:
            with files.open_to_read(files.inside(folder, name), most) as file:
                size = os.fstat(file.fileno()).st_size
                is_other = known is not None and known.bytes != size
                sha256 = _NOT_HASHED if is_other else hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                found[name] = Recorded(sha256, size)
        except FileNotFoundError:
            continue
        except (OSError, files.UnsafePathError) as error:
            raise ExportError(f"{folder}: {error}", "do not use this adapter; get a clean copy of it") from error
    return found
