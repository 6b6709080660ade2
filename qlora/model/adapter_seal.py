"""Whether an adapter's folder is what was published in it, and stays so while it is read.

A run publishes its adapter with the sha256 of each file. Whoever opens one compares them before a tensor is read, and
again when the work is done: the weights are read in blocks, more than once and in more than one process, and what was
swapped in between must not go out under the name of what was checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora import disk, files, manifest
from qlora.errors import ExportError
from qlora.events import Notice, Sink, Sinks
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, PROVENANCE_FILE
from qlora.model.tokenizer_files import TOKENIZER_FILES

# What an adapter computes, and what it is said to be. All else (its card) is for people, who may edit it.
SEALED = (ADAPTER_FILE, ADAPTER_CONFIG, PROVENANCE_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True)
class AdapterSeal:
    """The sha256 of what stood in an adapter's folder when it was checked, of every file of SEALED that is there."""

    folder: Path
    sha256: Mapping[str, str]

    def check(self) -> None:
        """Raises ExportError when a file is no longer the one that was checked."""
        now = _hashed(self.folder)
        if changed := _first_difference(now, self.sha256):
            what = f"{self.folder / changed}: was replaced while it was being exported"
            raise ExportError(what, "export again, when nothing else writes into that folder")


def seal(folder: Path, sink: Sink) -> AdapterSeal:
    """Check an adapter's folder against its manifest; one without a manifest was made elsewhere, and passes.

    A card that was edited since is a notice. Raises ExportError naming the file when weights, configuration, provenance
    or tokenizer are not as they were published.
    """
    found = _hashed(folder)
    try:
        recorded = manifest.recorded_sha256(folder)
    except FileNotFoundError:
        if PROVENANCE_FILE in found:
            message = f"{folder} has no {disk.MANIFEST} any more: whether its files are as trained is not known"
            sink.emit(Notice("adapter", message))
        return AdapterSeal(folder, found)
    except (OSError, ValueError) as error:
        if PROVENANCE_FILE not in found:
            return AdapterSeal(folder, found)  # another tool's file of that name
        raise _not_as_published(folder, disk.MANIFEST, f"cannot be trusted ({error})") from error
    expected = {name: sha256 for name, sha256 in recorded.items() if name in SEALED}
    if changed := _first_difference(found, expected):
        verb = "is missing" if changed not in found else "was added" if changed not in expected else "was changed"
        raise _not_as_published(folder, changed, f"{verb} since the adapter was delivered (its sha256 differs)")
    if edited := [name for name in recorded if name not in SEALED and _sha256(folder, name) != recorded[name]]:
        message = (
            f"{', '.join(edited)} in {folder} was edited or removed since it was delivered; its weights are as trained"
        )
        sink.emit(Notice("adapter", message, len(edited)))
    return AdapterSeal(folder, found)


def damage(folder: Path) -> str | None:
    """What of a delivered adapter is not as it was published, in words; None where it can be used."""
    if not (folder / ADAPTER_FILE).exists():
        return f"{folder} holds no {ADAPTER_FILE}"
    try:
        seal(folder, Sinks())
    except ExportError as error:
        return error.what
    return None


def _not_as_published(folder: Path, name: str, what: str) -> ExportError:
    hint = (
        "put the file back, or let the run deliver it again with mode='resume'; "
        f"if you changed it on purpose, remove {disk.MANIFEST} there, and it is taken as it is"
    )
    return ExportError(f"{folder / name}: {what}", hint)


def _first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    return min((name for name in one.keys() | other.keys() if one.get(name) != other.get(name)), default=None)


def _hashed(folder: Path) -> dict[str, str]:
    hashes = {name: _sha256(folder, name) for name in SEALED}
    return {name: sha256 for name, sha256 in hashes.items() if sha256 is not None}


def _sha256(folder: Path, name: str) -> str | None:
    """Of one file of the folder; None where there is none. Raises ExportError for what is no plain file of it."""
    try:
        with files.open_to_read(files.inside(folder, name)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except FileNotFoundError:
        return None
    except (OSError, files.UnsafePathError) as error:
        raise ExportError(f"{folder}: {error}", "do not use this adapter; get a clean copy of it") from error
