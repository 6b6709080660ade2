"""What a published folder says of itself, and whether it is still true: who made it, of what, and each of its files.

`manifest.json` holds `made_by`, `version`, `kind`, `of`, the size and sha256 of every file, and a sha256 of all that.
Many programs have a file of that name: a folder is ours when that last hash is right, and only ours may be replaced.
(Up to version 0.5 manifests had the files and the last hash alone; they count.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from qlora import files, foreign_json

MANIFEST = "manifest.json"
MADE_BY = "qlora"
# Of a manifest: that of a kept base has 1,350 bytes a matrix, and takes up to 40,000 (`base_cache/record.py`).
MAX_BYTES = 64_000_000
_SELF = "sha256"  # of the manifest itself
_EXPORT_FILE = "export.json"  # which every export has, and nothing else: up to version 0.5 a manifest has no `kind`


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex sha256 of strings, each ended by a NUL so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


class Recorded(NamedTuple):
    """A file as a manifest has it."""

    sha256: str
    bytes: int


class _Entry(foreign_json.ForeignModel):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class _Manifest(foreign_json.ForeignModel):
    files: dict[str, _Entry]
    sha256: str
    made_by: Literal["qlora"] | None = None
    kind: str | None = None

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, entries: dict[str, _Entry]) -> dict[str, _Entry]:
        for name in entries:
            if not name or os.path.isabs(name) or "\\" in name or "\0" in name or ".." in name.split("/"):
                raise ValueError(f"{name[:60]!r} is not a file's name in the folder")
        return entries


@dataclass(frozen=True)
class Standing:
    """Whose a folder is.

    "nobody"   nothing is there, or an empty folder
    "ours"     a published folder, every file as it was, and nothing else in it
    "changed"  a published folder, and since then something was changed, added or taken out
    "foreign"  anything else: a folder without a manifest of ours, a file, a link

    `why` says what of it makes it so, `kind` what the manifest says it is ("export", "adapter", …). `stamp` is what the
    file system knows of each file and folder in it (None for "foreign"): where it is the same later, nothing was
    written in between.
    """

    whose: Literal["nobody", "ours", "changed", "foreign"]
    why: str = ""
    kind: str | None = None
    stamp: Mapping[str, tuple[int, ...]] | None = None


def standing(folder: Path, hashes: bool) -> Standing:
    """Whose the folder is; `hashes`: every file is read, else names and sizes decide. No link is followed."""
    try:
        if not os.path.lexists(folder):
            return Standing("nobody")
        if files.is_link(folder) or not folder.is_dir():
            return Standing("foreign", "it is a link" if files.is_link(folder) else "it is not a folder")
        if not os.listdir(folder):
            return Standing("nobody")
        if not os.path.lexists(folder / MANIFEST):
            return Standing("foreign", f"it has no {MANIFEST}")
        manifest = read(folder)
        entries = _checked(manifest)
        found = contents(folder)
    except foreign_json.ForeignFileError:
        return Standing("foreign", f"its {MANIFEST} is not an export's, or damaged")
    except OSError as error:
        return Standing("foreign", f"it cannot be looked at: {error.strerror or error}")
    why = _addition(entries, found) or _fault(folder, entries, hashes)
    kind = manifest.get("kind") or ("export" if _EXPORT_FILE in entries else None)
    return Standing("changed" if why else "ours", why or "", kind, stamp_of(found))


def verify(folder: Path) -> str | None:
    """None when every file of the manifest is there with its size and sha256, else what is wrong. No link counts."""
    try:
        return _fault(folder, _checked(read(folder)), hashes=True)
    except foreign_json.ForeignFileError as error:
        reason = str(error).removeprefix(f"{folder / MANIFEST}: ").removeprefix(f"{MANIFEST}: ")
        return f"{MANIFEST} {reason}"


def read(folder: Path) -> dict[str, Any]:
    """A published folder's manifest; its files may have changed since. Raises ForeignFileError (a ValueError)."""
    return foreign_json.load_object(folder / MANIFEST, MAX_BYTES)


def recorded(folder: Path) -> dict[str, Recorded]:
    """What a published folder's manifest says of each file; the files are not looked at.

    Raises FileNotFoundError where there is no manifest, ForeignFileError for one that is damaged or none of ours.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise FileNotFoundError(errno.ENOENT, f"there is no {MANIFEST}", str(folder / MANIFEST))
    return {name: Recorded(entry.sha256, entry.bytes) for name, entry in _checked(read(folder)).items()}


def of_text(data: bytes, where: str) -> dict[str, Any]:
    """A manifest that somebody sent, checked as one in a folder is. Raises ForeignFileError."""
    found = foreign_json.parse_object(data, where)
    _checked(found)
    return found


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with the hash of itself."""
    # No newline at its end: a manifest that lacks its last byte must not be a manifest.
    return json.dumps({**manifest, _SELF: _sha256_of(manifest)}, indent=1, sort_keys=True)


def contents(folder: Path) -> dict[str, os.stat_result]:
    """Everything below a folder, folders too, by its name in it and as lstat sees it. No link is followed."""
    found: dict[str, os.stat_result] = {}
    waiting = [""]
    while waiting:
        place = waiting.pop()
        for name in os.listdir(folder / place):
            inner = f"{place}/{name}" if place else name
            found[inner] = os.lstat(folder / inner)
            if stat.S_ISDIR(found[inner].st_mode) and not files.is_link(folder / inner):
                waiting.append(inner)
    return found


def stamp_of(found: Mapping[str, os.stat_result]) -> dict[str, tuple[int, ...]]:
    """Of what `contents` found, what changes when a file is written: its size, and when that was last."""
    return {
        name: () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
        for name, status in found.items()
    }


def _checked(manifest: dict[str, Any]) -> dict[str, _Entry]:
    """The files of a manifest that is ours. Raises ForeignFileError."""
    entries = foreign_json.checked(_Manifest, manifest, MANIFEST).files
    rest = {key: value for key, value in manifest.items() if key != _SELF}
    if manifest[_SELF] != _sha256_of(rest):
        raise foreign_json.ForeignFileError(f"{MANIFEST}: is damaged (its own sha256 differs)")
    return entries


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    """Of everything in a manifest but this hash itself: versions and names are protected like the files are."""
    return sha256_text(json.dumps(manifest, sort_keys=True))


def _addition(entries: Mapping[str, _Entry], found: Mapping[str, os.stat_result]) -> str | None:
    """The first file or folder that is not of the manifest."""
    folders = {str(parent) for name in entries for parent in Path(name).parents}
    for name, status in sorted(found.items()):
        if name != MANIFEST and name not in (folders if stat.S_ISDIR(status.st_mode) else entries):
            return f"{name} was added"
    return None


def _fault(folder: Path, entries: Mapping[str, _Entry], hashes: bool) -> str | None:
    """The first file of the manifest that is missing, no plain file, or has other bytes."""
    for name, entry in entries.items():
        try:
            path = files.inside(folder, name)
            files.refuse_links(folder, folder / name)
            with files.open_to_read(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.bytes:
                    return f"{name} has {size} bytes, not {entry.bytes}"
                if hashes and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return f"{name} is damaged (its sha256 differs from the manifest's)"
        except FileNotFoundError:
            return f"{name} is missing"
        except files.UnsafePathError as error:
            return str(error)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None
