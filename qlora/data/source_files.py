"""Which files a source of rows is: a file, a folder with all below it, or a pattern; and how one of them is opened.

The path that a user names may be a link, and is resolved once. Below it (for a pattern: below the part before its first
`*`, `?` or `[`) a link is followed only when it ends in that folder, or in the blobs of the same hub repository. Others
are left out and counted by name: a folder of rows from a stranger must not bring `notes.txt -> ~/diary.txt` along.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import stat
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qlora import files, windows_paths
from qlora.data.saved_sets import without_descriptions
from qlora.data.splits import by_split, of_split
from qlora.errors import DataError, UserError
from qlora.recipe.pins import folder_split
from qlora.shown import one_line

MAX_FILES = 100_000  # of one source: each takes about 0.5 kB of memory, and is opened and hashed at every start
MAX_ENTRIES = 200_000  # names looked at below one folder: a second or two; a whole disk has millions
_OF_LINKS = (
    "a link is followed where a path names it: give each a table of its own in the recipe, or put the files there"
)
EXAMPLES = 5  # names of what was left out
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # OWNER/NAME
_BUFFER_BYTES = 1 << 20
_LINKS = "links that end outside of the folder or nowhere"
_NO_FILES = "pipes, devices or sockets"
_OTHER_KINDS = "files of other kinds"
_NOT_READABLE = "folders that cannot be read"


@dataclass(frozen=True)
class SourceFile:
    """A file of rows as it was found. `path` is resolved; `name` is for messages, with nothing that cannot be shown."""

    path: Path
    name: str
    ending: str
    size_bytes: int
    modified_ns: int
    inode: int

    def open(self) -> IO[bytes]:
        """The bytes that the file had when it was found. Raises DataError when it is another one by now, also later.

        What is appended meanwhile is not read: a file that grows for ever has an end too.
        """
        try:
            file = files.open_to_read(self.path)
        except files.UnsafePathError as error:
            raise DataError(one_line(str(error)), "name a plain file") from error
        except OSError as error:
            raise self.unreadable(error) from error
        try:
            self.check_unchanged(os.fstat(file.fileno()))
        except DataError:
            file.close()
            raise
        return io.BufferedReader(_Unchanged(self, file), _BUFFER_BYTES)

    def sha256(self) -> str:
        """Hex sha256 of the bytes. Raises DataError."""
        with self.open() as file:
            try:
                return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            except OSError as error:
                raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> DataError:
        """What is said of a file that the system does not give."""
        return DataError(f"{self.name}: cannot be read ({error.strerror or error})", "check its permissions")

    def check_unchanged(self, status: os.stat_result) -> None:
        """Raise DataError unless `status` is that of the file as it was found."""
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (self.size_bytes, self.modified_ns, self.inode):
            hint = "wait until nothing writes to it any more, or give a copy of it"
            raise DataError(f"{self.name}: the file was changed while it was read", hint)


class _Unchanged(io.RawIOBase):
    """A file of rows that ends where it ended when it was found."""

    def __init__(self, source: SourceFile, file: IO[bytes]) -> None:
        self._source = source
        self._left = source.size_bytes
        self._file = file

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._source.size_bytes - self._left

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto1(view) if len(view) else 0  # type: ignore[attr-defined]
        self._left -= count
        if not count:
            self._source.check_unchanged(os.fstat(self._file.fileno()))
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class FoundFiles:
    """The files of a source in their order, and what was left out: (what it is, how many, the first names)."""

    files: tuple[SourceFile, ...]
    left_out: tuple[tuple[str, int, tuple[str, ...]], ...] = ()

    def left_out_text(self) -> str:
        """What was left out, in words; "" where nothing was."""
        parts = [
            f"{count} {what} left out: {', '.join(names)}{', …' if count > len(names) else ''}"
            for what, count, names in self.left_out
        ]
        return "; ".join(parts)


def find_files(path: str, endings: Collection[str], count_others: bool = False) -> FoundFiles:
    """The files of a source. `path` names a file, a folder (all of it, or `folder:SPLIT`), or is a pattern.

    A name that exists is no pattern and names no split. With `count_others` files of other endings, also those of a
    pattern, are left out by name. Raises DataError when there is none, when one that was named is of a kind not in
    `endings`, and for more than MAX_FILES.
    """
    whole, split = folder_split(path)
    place, pattern = _split(whole)
    try:
        root = files.user_path(place, "path")
        status = root.stat()
    except UserError as error:
        raise DataError(error.what, error.hint) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(Path(path), pattern, endings) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})", "check its permissions") from error
    if split and (pattern or not stat.S_ISDIR(status.st_mode)):
        what = f"{path}: no such file, and {split!r} can be the split of a folder only"
        raise DataError(what, "write folder:SPLIT, or the path of a file or pattern alone")
    if not stat.S_ISDIR(status.st_mode):
        if pattern:
            raise _missing(Path(path), pattern, endings)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file", "name a file, a folder or a pattern")
        return FoundFiles((_source_file(place.name, root, status, endings, path),))
    search = _Search(root, path)
    # A folder is everything below it that has a known ending; a pattern names its files, whatever they are.
    found = search.files(pattern or ("**", "*"), () if pattern or count_others else endings)
    if count_others:
        found = search.of_endings(found, endings)
    rows = without_descriptions(found, lambda name: found[name][0], search.leave_out)
    if split and rows and not (rows := set(of_split(sorted(rows, key=Path), split))):
        what = f"{whole}: has no split {split!r}, but {by_split(found).counted}"
        raise DataError(what, "name one of its splits, or a file")
    found = {name: place for name, place in found.items() if name in rows}
    result = FoundFiles(
        tuple(_source_file(name, *found[name], endings, path) for name in sorted(found, key=Path)),
        tuple((what, len(names), tuple(names)[:EXAMPLES]) for what, names in search.left_out.items()),
    )
    if not found and pattern:
        raise _missing(Path(path), pattern, endings, result.left_out_text())
    if not found:
        left_out = f" ({result.left_out_text()})" if result.left_out else ""
        hint = _OF_LINKS if "links" in left_out else f"known endings: {', '.join(endings)}"
        raise DataError(f"{path}: no data file in this folder{left_out}", hint)
    return result


def _split(path: str) -> tuple[Path, tuple[str, ...]]:
    """The part of a path that is taken as it stands, and the pattern below it.

    What exists under its very name is no pattern: a folder may be called `data [v2]`.
    """
    parts = Path(path).parts
    for number, part in enumerate(parts):
        if glob.has_magic(part) and "\0" not in part and not os.path.lexists(Path(*parts[: number + 1])):
            if ".." in parts[number:]:
                raise DataError(f"{path}: a pattern cannot go up (..) again", "write .. before the first * only")
            return Path(*parts[:number]), parts[number:]
    return Path(path), ()


def _missing(path: Path, pattern: tuple[str, ...], endings: Collection[str], left_out: str = "") -> DataError:
    if pattern:
        hint = windows_paths.how_to_write(path) or "check the pattern; it is relative to the recipe's folder"
        hint = _OF_LINKS if "links" in left_out else hint
        left_out = f" ({left_out})" if left_out else ""
        return DataError(f"{path}: no file matches{left_out}", hint)
    near: list[str] = []
    if path.parent.is_dir():
        near = sorted(one_line(p.name) for p in path.parent.glob("*") if p.suffix.lower() in endings)[:EXAMPLES]
    hint = f"data files in that folder: {', '.join(near)}" if near else "check the path in the recipe"
    if not path.suffix and _HUB_NAME.fullmatch("/".join(path.parts[-2:])) and not path.parent.is_dir():
        hint = f"a data set of the hub is path = {json.dumps('hub:' + '/'.join(path.parts[-2:]))}; else check the path"
    return DataError(f"{path}: no such file", windows_paths.how_to_write(path) or hint)


def _source_file(name: str, real: Path, status: os.stat_result, endings: Collection[str], path: str) -> SourceFile:
    ending = Path(name).suffix.lower()
    if ending not in endings:
        kind = one_line(ending) or "no ending"
        what = path if path.endswith(name) else f"{path}: {name}"
        raise DataError(f"{one_line(what)}: unknown kind of file ({kind})", f"known endings: {', '.join(endings)}")
    return SourceFile(real, one_line(name), ending, status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass
class _Search:
    """One walk below the folder `root`, which is resolved; `path` is what the user wrote."""

    root: Path
    path: str
    entries: int = 0
    listed: dict[Path, list[os.DirEntry[str]]] = field(default_factory=dict)
    left_out: dict[str, dict[str, None]] = field(default_factory=dict)  # names by what they are

    def files(self, pattern: tuple[str, ...], endings: Collection[str]) -> dict[str, tuple[Path, os.stat_result]]:
        """Regular files that match, by their name below the root: where each really is, and what it is."""
        folders = {"": self.root}
        *parts, last = (*pattern, "*") if pattern[-1] == "**" else pattern
        for part in parts:
            folders = self._all_below(folders) if part == "**" else self._folders(folders, part)
        found: dict[str, tuple[Path, os.stat_result]] = {}
        for name, folder in folders.items():
            for child, real, status, _ in self._children(name, folder, last, of_folders=False, endings=endings):
                if stat.S_ISREG(status.st_mode):
                    found[child] = real, status
                elif not stat.S_ISDIR(status.st_mode):
                    self.leave_out(_NO_FILES, child)
                if len(found) > MAX_FILES:
                    hint = "join them into fewer files, or name a narrower pattern"
                    raise DataError(f"{self.path}: more than {MAX_FILES:,} data files", hint)
        return found

    def of_endings(
        self, found: dict[str, tuple[Path, os.stat_result]], endings: Collection[str]
    ) -> dict[str, tuple[Path, os.stat_result]]:
        """Those of these files; the others are left out by name."""
        for name in sorted(name for name in found if Path(name).suffix.lower() not in endings):
            self.leave_out(_OTHER_KINDS, name)
        return {name: place for name, place in found.items() if Path(name).suffix.lower() in endings}

    def _folders(self, folders: dict[str, Path], part: str) -> dict[str, Path]:
        return {
            child: real
            for name, folder in folders.items()
            for child, real, status, _ in self._children(name, folder, part, of_folders=True)
            if stat.S_ISDIR(status.st_mode)
        }

    def _all_below(self, folders: dict[str, Path]) -> dict[str, Path]:
        """These folders and all below them, each once, however many links lead to it: `a -> .` has an end."""
        found: dict[str, Path] = {}
        seen: set[tuple[int, int]] = set()
        ahead, links = deque(folders.items()), deque[tuple[str, Path]]()
        while ahead or links:  # a folder's own name comes before that of a link to it
            name, folder = ahead.popleft() if ahead else links.popleft()
            try:
                status = folder.stat()
            except OSError:  # it went away meanwhile
                self.leave_out(_NOT_READABLE, name or ".")
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            found[name] = folder
            for child, real, below, is_link in self._children(name, folder, "*", of_folders=True):
                if stat.S_ISDIR(below.st_mode):
                    (links if is_link else ahead).append((child, real))
        return found

    def _children(
        self, name: str, folder: Path, part: str, *, of_folders: bool, endings: Collection[str] = ()
    ) -> Iterator[tuple[str, Path, os.stat_result, bool]]:
        """(name below the root, resolved path, status, whether it is a link) of what in `folder` matches `part`."""
        try:
            listed = self._listing(folder)
        except OSError:
            self.leave_out(_NOT_READABLE, name or ".")
            return
        for entry in listed:
            if not _matches(entry.name, part) or (endings and Path(entry.name).suffix.lower() not in endings):
                continue
            child, path = f"{name}/{entry.name}" if name else entry.name, folder / entry.name
            is_link = entry.is_symlink()
            try:
                if entry.is_dir() != of_folders:  # of a link, what it leads to
                    continue
                is_link = files.is_link(path)  # a junction too
                real = _link_target(self.root, path) if is_link else path
                yield child, real, os.lstat(real), is_link
            except (files.UnsafePathError, OSError):
                if not of_folders or is_link:
                    self.leave_out(_LINKS if is_link else _NO_FILES, child)

    def _listing(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, read once however often it is asked for, and bounded while it is read."""
        if folder not in self.listed:
            with os.scandir(folder) as entries:
                found = list(islice(entries, MAX_ENTRIES - self.entries + 1))
            self.entries += len(found)
            if self.entries > MAX_ENTRIES:
                hint = "name the folder of the rows alone"
                raise DataError(f"{self.path}: more than {MAX_ENTRIES:,} files and folders to look through", hint)
            self.listed[folder] = sorted(found, key=lambda entry: entry.name)
        return self.listed[folder]

    def leave_out(self, what: str, name: str) -> None:
        """Count something under what it is."""
        self.left_out.setdefault(what, {})[one_line(name)] = None


def _matches(name: str, part: str) -> bool:
    hidden = name.startswith(".") and not part.startswith(".")
    return not hidden and (name == part or fnmatch(name, part))


def _link_target(root: Path, path: Path) -> Path:
    """Where a link below `root` ends. Raises UnsafePathError when that is elsewhere."""
    # A hub snapshot's files are links into the blobs beside `snapshots`; rows may lie in a folder of the snapshot.
    home = next((place for place in root.parents if place.parent.name == "snapshots"), root)
    if not home.parent.parent.name.startswith("datasets--"):
        home = root
    real = files.inside(home, path.relative_to(home).as_posix())
    if not real.is_relative_to(root) and real.is_relative_to(home):
        raise files.UnsafePathError(f"{path} ends outside of {root}")
    return real
