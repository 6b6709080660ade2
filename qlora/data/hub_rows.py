"""What the sources of a recipe mean: data sets of the hub downloaded, and of folders the split that is meant.

One rule for both (`splits.py`): a source without a split means the training split. A validation split beside it is
evaluated on where the recipe has no [[data.eval]] (then `eval_fraction` takes no rows from the training), a test split
is never touched. What is found is recorded with its commit and split, so that a run that goes on means the same.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from qlora import hub
from qlora.data.card_splits import splits_of_names
from qlora.data.saved_sets import dictionary
from qlora.data.sources import source_files
from qlora.data.splits import ALL, TEST, TRAIN, VALIDATION, Splits, by_split, counted, evaluated, of_split
from qlora.data.splits import without_training as no_training
from qlora.errors import DataError
from qlora.events import Notice, Sink
from qlora.recipe.pins import HubRows, folder_split, parse_hub_rows
from qlora.recipe.sections import DataSection, SourceSection
from qlora.shown import one_line

ROW_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# What the library datasets and the hub write beside rows.
_NO_ROWS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class LocalRows:
    """`local` has the paths of files in the place of `hub:` sources; `pinned` what a run records: see `localize`."""

    local: DataSection
    pinned: DataSection


class _Place(NamedTuple):
    """Rows as a path of local files, and as a run records them."""

    local: str
    pinned: str


class _Meant(NamedTuple):
    """What a source means; `validation` are the rows to evaluate on that it brings along."""

    rows: _Place
    validation: _Place | None = None


def localize(data: DataSection, sink: Sink) -> LocalRows:
    """The sections with every `hub:` source downloaded and every split named; everything below reads files only.

    Raises DataError for a source that has no rows to train or to evaluate on, or several that could be meant.
    """
    train = [(section, _to_train(section, not data.eval, sink)) for section in data.train]
    evaluation = [(section, _to_evaluate(section, sink)) for section in data.eval]
    if not data.eval:
        found = [(section.model_copy(update={"weight": 1.0}), meant.validation) for section, meant in train]
        evaluation = [(section, place) for section, place in found if place is not None]
    sides: dict[str, list[tuple[SourceSection, _Place]]] = {
        "train": [(section, meant.rows) for section, meant in train],
        "eval": evaluation,
    }

    def with_paths(of: str) -> DataSection:
        def placed(side: str) -> tuple[SourceSection, ...]:
            pairs = sides[side]
            return tuple(section.model_copy(update={"path": getattr(place, of)}) for section, place in pairs)

        return data.model_copy(update={side: placed(side) for side in sides if sides[side]})

    return LocalRows(with_paths("local"), with_paths("pinned"))


def _to_train(section: SourceSection, wants_validation: bool, sink: Sink) -> _Meant:
    """What a source of [[data.train]] means, with a notice where its files are of several splits."""
    path = section.path
    if path.startswith("hub:"):
        return _hub_to_train(path, wants_validation, sink)
    if section.format == "documents" or not _is_bare_folder(path):
        return _Meant(_Place(path, path))
    splits, name = _splits_of(path), one_line(Path(path).name)
    if not splits.named:
        _say_unnamed(path, name, sink)
        return _Meant(_Place(path, path))
    if not splits.to_train:
        raise no_training(path, splits, name)
    _say(name, splits, wants_validation, sink)
    rows, validation = (_Place(f"{path}:{split}", f"{path}:{split}") for split in (TRAIN, VALIDATION))
    return _Meant(rows, validation if splits.validation and wants_validation else None)


def _to_evaluate(section: SourceSection, sink: Sink) -> _Place:
    """What a source of [[data.eval]] means."""
    path = section.path
    if path.startswith("hub:"):
        rows, snapshot = _looked_up(path, VALIDATION, sink)
        splits = by_split(_row_files(snapshot.files))
        split = rows.split or evaluated(splits, snapshot.repository.error, f"hub:{rows.name}")
        if split in ("", ALL):
            split = rows.split or (TRAIN if splits.to_train else TEST)
        return _fetched(snapshot, rows, split, sink)
    if section.format == "documents" or not _is_bare_folder(path):
        return _Place(path, path)
    splits = _splits_of(path)
    if not splits.named:
        _say_unnamed(path, one_line(Path(path).name), sink)
    split = evaluated(splits, lambda what, hint: DataError(f"{path}: {what}", hint), one_line(Path(path).name))
    meant = f"{path}:{split}" if split else path
    return _Place(meant, meant)


def _is_bare_folder(path: str) -> bool:
    """Whether a path names a folder as a whole."""
    return not folder_split(path)[1] and os.path.isdir(path)


def _splits_of(path: str) -> Splits:
    """The files of a folder by their splits. Raises DataError where its card says otherwise than their names."""
    return splits_of_names(path, [file.name for file in source_files(SourceSection(path=path)).files])


def _say_unnamed(path: str, name: str, sink: Sink) -> None:
    """A notice that a saved dictionary of sets, none of which is called like a split, is taken whole."""
    if len(sets := dictionary(Path(path))) > 1:
        listed = ", ".join(map(one_line, sets[:3])) + (", …" if len(sets) > 3 else "")
        message = f"{name}: {len(sets)} sets of rows, none of which is called train, are all taken: {listed}"
        sink.emit(Notice("split", f'{message} (path = "{name}:{one_line(sets[0])}" names one)', len(sets)))


def _say(name: str, splits: Splits, wants_validation: bool, sink: Sink) -> None:
    """A notice on what becomes of each split of a source."""
    parts = [f"the training split is trained ({counted(len(splits.to_train))})"]
    if splits.validation:
        files = counted(len(splits.validation))
        used = "is evaluated on, and data.eval_fraction holds out no row"
        unused = "is left out, since the recipe has [[data.eval]]"
        parts.append(f"the validation split ({files}) {used if wants_validation else unused}")
    if splits.test:
        parts.append(f'the test split ({counted(len(splits.test))}) is not touched (path = "{name}:{TEST}" names it)')
    if splits.train and splits.other:
        first = ", ".join(map(one_line, splits.other[:3])) + (", …" if len(splits.other) > 3 else "")
        parts.append(f"{counted(len(splits.other))} of no split left out: {first}")
    sink.emit(Notice("split", f"{name}: {'; '.join(parts)}", len(splits.to_train)))


# --- the hub ----------------------------------------------------------------------------------------------------------


def _looked_up(source: str, split: str, sink: Sink) -> tuple[HubRows, hub.Snapshot]:
    """A source `hub:NAME[@revision][:split]` and its repository; `split` is the one that is wanted unless it names one.

    Raises DataError.
    """
    rows = parse_hub_rows(source)
    if rows is None:
        what = f"{source}: is not of the form hub:NAME[@revision][:split]"
        raise DataError(what, "for example hub:tatsu-lab/alpaca, or hub:owner/name@main:train")
    repository = hub.Repository(rows.name, rows.revision, "dataset")
    return rows, hub.look_up(repository, _patterns(rows.split or split), sink)


def _hub_to_train(source: str, wants_validation: bool, sink: Sink) -> _Meant:
    rows, snapshot = _looked_up(source, TRAIN, sink)
    if rows.split:
        return _Meant(_fetched(snapshot, rows, rows.split, sink))
    splits, name = by_split(_row_files(snapshot.files)), f"hub:{rows.name}"
    if splits.named and not splits.to_train:
        raise no_training(rows.name, splits, name)
    place = _fetched(snapshot, rows, TRAIN, sink)
    if len(_sets(splits.validation)) > 1:
        what = f"{name}: the validation split stands in several places and is not evaluated on"
        sink.emit(Notice("split", what, len(splits.validation)))
        return _Meant(place)
    if splits.validation or splits.test:
        _say(name, splits, wants_validation, sink)
    if not splits.validation or not wants_validation:
        return _Meant(place)
    return _Meant(place, _fetched(snapshot, rows, VALIDATION, sink))


def _fetched(snapshot: hub.Snapshot, rows: HubRows, split: str, sink: Sink) -> _Place:
    """The files of a split, downloaded: those whose names begin with it, in one folder, else those of `of_split`."""
    matching = (file for file in snapshot.files if any(fnmatch(file, pattern) for pattern in _patterns(split)))
    chosen = [file for file in matching if file.rpartition("/")[2].startswith(split)]  # `*` means folders too
    by_name = bool(chosen)
    if not by_name:
        chosen = of_split(_row_files(snapshot.files), split)
    folder, ending = _one_set(snapshot.repository, split, chosen)
    place = snapshot.fetch(sorted(chosen), sink)
    if by_name:
        local = f"{glob.escape(str(place / folder))}/{split}*{ending}"
    else:  # the word may stand in a folder's name: by the whole snapshot
        local = str(place / chosen[0]) if len(chosen) == 1 else f"{place}:{split}"
    return _Place(local, str(rows._replace(revision=snapshot.commit, split=split)))


def _patterns(split: str) -> list[str]:
    return [f"{place}{split}*{ending}" for place in ("", "*/") for ending in ROW_FILES]


def _row_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that hold rows, sorted."""
    rows = (name for name in names if name.endswith(ROW_FILES) and name.rpartition("/")[2] not in _NO_ROWS)
    return sorted(name for name in rows if not any(part.startswith(".") for part in name.split("/")))


def _sets(files: Iterable[str]) -> list[tuple[str, str]]:
    """The folders and endings of files."""
    return sorted({(str(Path(name).parent), Path(name).suffix) for name in files})


def _one_set(repository: hub.Repository, split: str, files: Sequence[str]) -> tuple[str, str]:
    """Folder and ending of a split's files: one of each, or else it is not clear which are meant."""
    kinds = _sets(files)
    if not kinds:
        what = f"no file of the split {split!r} as {', '.join(ROW_FILES)}"
        raise repository.error(what, "name another split, or download the rows and give their path")
    if len(kinds) > 1:
        what = f"the split {split!r} stands in several places ({', '.join(place + '/*' + end for place, end in kinds)})"
        raise repository.error(what, "download the rows and give their path")
    return kinds[0]
