"""Which files are which split by the README.md of a folder, as data sets of the hub say it (`configs:` in its header).

    configs:
    - config_name: default
      data_files:
      - split: train
        path: data/*.csv

Splits are told here by the files' names (`splits.py`). Where a card says something else, neither is taken in silence:
the folder is refused, and the files are named by their path. Only this part of the header is read, line by line; what
is written in another way of YAML's is not understood and says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path, PurePosixPath

from qlora import files
from qlora.data.splits import TEST, TRAIN, VALIDATION, Splits, by_split
from qlora.errors import DataError
from qlora.shown import one_line

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
MAX_LINES = 10_000  # of the header: a set of the hub with a config for each of 1,000 languages has 6,000
_LINE = re.compile(r"^(?P<indent> *)(?P<item>(?:- +)*)(?:(?P<key>[a-z_]+):(?: +|$))?(?P<value>.*)$")
_BRACES = re.compile(r"\{([^{},]*(?:,[^{},]*)+)\}")
_MAX_ALTERNATIVES = 100  # of one pattern: {a,b}{a,b}… would double with every pair
_MAX_PATTERN = 4096  # characters: Linux takes no longer path
_SHOWN = 3
_TRUE = ("true", "yes", "on")  # YAML 1.1, which the hub reads: in any case
_QUOTES = ("'", '"')
_LISTED = re.compile(r"""\s*(?:"[^"]*"|'[^']*'|[^,]+)""")


@dataclass
class _Set:
    """One of `configs`: patterns of files by split."""

    name: str = "default"
    is_default: bool = False
    patterns: dict[str, list[str]] = field(default_factory=dict)
    folder: str = ""  # in which the names tell the splits


def splits_of_names(folder: str, names: Sequence[str]) -> Splits:
    """`by_split` of a folder's files. Raises DataError where the folder's card says otherwise."""
    splits = by_split(names)
    _check_card(folder, names, splits)
    return splits


def _check_card(folder: str, names: Sequence[str], splits: Splits) -> None:
    sets = [(one, _found(one, names)) for one in _sets(_header(Path(folder))) if one.patterns or one.folder]
    here = [(one, found) for one, found in sets if any(found.values())]  # of others no file is among these
    chosen = [one for one in here if one[0].is_default] or [one for one in here if one[0].name == "default"] or here
    if not chosen:
        return
    said, found = chosen[0]
    if len(chosen) > 1:
        listed = ", ".join(one_line(one.name) for one, _ in chosen[:_SHOWN]) + (", …" if len(chosen) > _SHOWN else "")
        what = f"{folder}: {CARD} says that the files are {len(chosen)} sets: {listed}"
        raise DataError(what, _hint(folder, said))
    if _meant(found) != (set(splits.to_train), set(splits.validation)):
        first = ", ".join(f"{one_line(split)} is {one_line(paths[0])}" for split, paths in said.patterns.items())
        first = first or f"they are those in {one_line(said.folder)}"
        what = f"{folder}: {CARD} says which files are which split, and otherwise than their names do: {first}"
        raise DataError(what, _hint(folder, said))


def _hint(folder: str, said: _Set) -> str:
    train = next(iter(said.patterns.get(TRAIN) or chain(*said.patterns.values(), [""])))
    path = json.dumps(f"{Path(folder).name}/{one_line(str(PurePosixPath(said.folder, train)))}", ensure_ascii=False)
    return f"name the files that are meant: path = {path}; or take `configs` out of {CARD}"


def _found(said: _Set, names: Sequence[str]) -> dict[str, set[str]]:
    """The files that are here of each split of a set. Patterns are of names below its folder."""
    paths = [path for path in map(PurePosixPath, names) if path.is_relative_to(said.folder)]
    below = {str(path.relative_to(said.folder)): str(path) for path in paths}
    if said.patterns:
        return {
            split: {name for part, name in below.items() if any(_matches(part, pattern) for pattern in patterns)}
            for split, patterns in said.patterns.items()
        }
    splits = by_split(below)
    parts = {TRAIN: splits.to_train, VALIDATION: splits.validation, TEST: splits.test}
    return {split: {below[part] for part in files_of} for split, files_of in parts.items()}


def _meant(found: Mapping[str, set[str]]) -> tuple[set[str], set[str]]:
    """The files of the training and of the validation split, whose words are those of files and folders.

    A name that is no known word ("full") is a training split where it is the only one of that kind, and none is called
    train: of several nobody knows.
    """
    of_word = {f"{split}/_": files_of for split, files_of in found.items()}
    kinds = by_split(of_word)
    trained = kinds.train or (kinds.other if len(kinds.other) == 1 else ())
    return set(chain(*map(of_word.__getitem__, trained))), set(chain(*map(of_word.__getitem__, kinds.validation)))


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./").rstrip("/")
    if "**" in pattern:
        return fnmatchcase(name, pattern.replace("**/", "*")) or fnmatchcase(name, pattern)
    parts, wanted = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _header(folder: Path) -> list[str]:
    """The lines of the card's header; none where there is no card, or a link out of the folder, or too large a file."""
    try:
        text = files.read_bytes(files.inside(folder.resolve(), CARD), MAX_CARD_BYTES).decode("utf-8", "replace")
    except (OSError, files.UnsafePathError):
        return []
    lines = text.replace("\r\n", "\n").removeprefix("\ufeff").split("\n", MAX_LINES)[:MAX_LINES]
    if lines[0].rstrip() != "---":
        return []
    end = next((at for at, line in enumerate(lines) if at and line.rstrip() == "---"), 0)
    return lines[1:end]


class _Reading:
    """The lines under `configs:`, one after another. An item of `data_files` counts at its end: YAML's keys have no
    order, and a writer that sorts them puts `path` before `split`."""

    def __init__(self) -> None:
        self.sets: list[_Set] = []
        self.indent: int | None = None  # of the sets' own lines
        self.split, self.paths = TRAIN, list[str]()
        self.wants = False  # paths, one a line

    def read(self, indent: int, item: bool, key: str | None, value: str) -> None:
        if item and self.indent in (None, indent):
            self.end_item()
            self.indent = indent
            self.sets.append(_Set())
        if not self.sets:
            return
        if (item and key is not None) or key not in ("split", "path", None):
            self.end_item()
        plain = _plain(value)
        if key == "config_name":
            self.sets[-1].name = plain
        elif key == "default":
            self.sets[-1].is_default = plain.lower() in _TRUE
        elif key == "data_dir":
            self.sets[-1].folder = plain
        elif key == "split":
            self.split = plain
        if key in ("data_files", "path"):
            self.wants = not plain
            self.paths += _paths(value)
        elif key is None and item and self.wants:
            self.paths += _paths(value)
        else:
            self.wants = False

    def end_item(self) -> None:
        """Files its paths under its split: `train` where it names none."""
        if self.paths:
            self.sets[-1].patterns.setdefault(self.split, []).extend(self.paths)
        self.split, self.paths = TRAIN, []


def _sets(header: Sequence[str]) -> list[_Set]:
    """What stands under `configs:`."""
    reading, within = _Reading(), False
    for line in header:
        found = _LINE.match(line)
        if found is None or not line.strip() or line.lstrip().startswith("#"):
            continue
        if not found["indent"] and not found["item"]:
            within = found["key"] == "configs" and not _plain(found["value"])
        elif within:
            reading.read(len(found["indent"]), bool(found["item"]), found["key"], found["value"])
    reading.end_item()
    return reading.sets


def _paths(value: str) -> list[str]:
    """The pattern or the list of patterns that stands behind a key or in a line of its own."""
    value = value.strip()
    listed = _plain(value) if value[:1] not in _QUOTES else ""
    inner = _LISTED.findall(listed[1:-1]) if listed.startswith("[") and listed.endswith("]") else [value]
    parts = [part.strip() for part in inner if part.strip() and not part.strip().startswith(("{", "&", "*&", "|"))]
    return [path for part in parts for path in _alternatives(_plain(part))]


def _alternatives(pattern: str) -> list[str]:
    """The patterns that one with braces stands for, as a shell has it: `{a,b}.csv`. With too many it stays one."""
    found, left = list[str](), [pattern]
    while left:
        one = left.pop()
        braces = _BRACES.search(one) if len(one) <= _MAX_PATTERN else None
        if braces is None:
            found.append(one)
        else:
            left += [one[: braces.start()] + word + one[braces.end() :] for word in reversed(braces[1].split(","))]
        if len(found) + len(left) > _MAX_ALTERNATIVES:
            return [pattern]
    return found


def _plain(value: str) -> str:
    """A scalar without its quotes or the comment behind it."""
    value = value.strip()
    if value[:1] in _QUOTES:
        return value[1:].partition(value[0])[0]
    return value.partition(" #")[0].strip()
