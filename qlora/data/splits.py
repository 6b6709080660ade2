"""Which split of a data set a file belongs to: one rule for folders of this machine and for data sets of the hub.

The words are those of the hub's own rule (datasets, data_files.py): a folder of that name (`train/`, `test/`), else the
file's name (`train-00000-of-00003.parquet`, `rows_test.jsonl`), the word set apart by `-`, `.`, `_`, a blank, a digit.
What differs: where the hub drops files without such a word beside others, they are counted here; a name with two words
counts as the later of train, validation, test, so that nothing that may be a test is trained; and `eval` is a
validation, but a test where something else is called a validation ("train, dev, eval").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from qlora.errors import DataError

ALL = "all"  # every file, whatever its split
TRAIN, VALIDATION, TEST = "train", "validation", "test"
_EVAL = "eval"
_WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    _EVAL: ("eval", "evaluation"),
    TEST: ("test", "testing"),
}
_KIND_OF_WORD = {word: kind for kind, words in _WORDS.items() for word in words}
_APART = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class Splits:
    """Names of files by their split; `other` are those whose names have no word of one."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    other: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether any file belongs to a split by its name."""
        return bool(self.train or self.validation or self.test)

    @property
    def to_train(self) -> tuple[str, ...]:
        """The training split; where no file is called so, what belongs to no other split."""
        return self.train or self.other

    @property
    def counted(self) -> str:
        """The splits that are there, in words: "train (2 files), test (1 file)"."""
        groups = ((TRAIN, self.train), (VALIDATION, self.validation), (TEST, self.test), ("others", self.other))
        return ", ".join(f"{name} ({counted(len(files))})" for name, files in groups if files)


def counted(files: int) -> str:
    """A number of files, in words."""
    return f"{files:,} file" if files == 1 else f"{files:,} files"


def by_split(names: Iterable[str]) -> Splits:
    """Files (by their names below the folder, with `/`) and the split of each, as far as their names say it."""
    kinds: dict[str | None, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name), []).append(name)
    validation, unclear, test = (kinds.get(kind, []) for kind in (VALIDATION, _EVAL, TEST))
    if validation:
        test = sorted(test + unclear)
    else:
        validation = unclear
    return Splits(tuple(kinds.get(TRAIN, ())), tuple(validation), tuple(test), tuple(kinds.get(None, ())))


def of_split(names: Sequence[str], split: str) -> list[str]:
    """The files of a split that is named: by the words of `by_split`, else those of that very name.

    "train" where no file is called so are those without a split; "all" is every file.
    """
    splits, kind = by_split(names), _KIND_OF_WORD.get(split.lower())
    of_kind: dict[str | None, tuple[str, ...]] = {
        TRAIN: splits.train,
        VALIDATION: splits.validation,
        _EVAL: splits.validation or splits.test,
        TEST: splits.test,
    }
    if split in (TRAIN, VALIDATION, TEST) and of_kind[split]:
        return list(of_kind[split])
    if exact := [name for name in names if split in _labels(name)]:
        return exact
    if split == ALL:
        return list(names)
    return list(of_kind.get(kind, ()) or (splits.other if kind == TRAIN else ()))


def evaluated(splits: Splits, error: Callable[[str, str], Exception], name: str) -> str:
    """The split that a folder means as rows to evaluate on, "" where its names say nothing. Raises what `error` makes.

    That is its validation split; a folder with files of one kind alone is meant whole.
    """
    if splits.validation:
        return VALIDATION
    if sum(map(bool, (splits.train, splits.test, splits.other))) > 1 and splits.named:
        what = f"has no validation split, but {splits.counted}"
        raise error(what, f'name the one to evaluate on: path = "{name}:{TEST if splits.test else TRAIN}"')
    return ALL if splits.named else ""


def without_training(place: str, splits: Splits, name: str) -> DataError:
    """What is said of a folder or data set none of whose files is to be trained."""
    named = VALIDATION if splits.validation else TEST
    hint = f'name the split to train on: path = "{name}:{named}"; a test split is never taken by itself'
    return DataError(f"{place}: has no training split, but {splits.counted}", hint)


def _kind(name: str) -> str | None:
    path = PurePosixPath(name)
    for part in (*path.parts[:-1], path.name.removesuffix(path.suffix)):
        kinds = {_KIND_OF_WORD[word] for word in _APART.split(part.lower()) if word in _KIND_OF_WORD}
        for kind in (TEST, _EVAL, VALIDATION, TRAIN):
            if kind in kinds:
                return kind
    return None


def _labels(name: str) -> set[str]:
    """What a split of that file may be called exactly: its folders, its name, its name without the shard's number."""
    path = PurePosixPath(name)
    stem = path.name.removesuffix(path.suffix)
    return {*path.parts[:-1], stem, _SHARD.sub("", stem)}
