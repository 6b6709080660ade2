"""Folders as `save_to_disk` of the library datasets writes them: rows in Arrow files, with descriptions beside them.

A Dataset is a folder with `dataset_info.json`, `state.json` and the `*.arrow` files that state.json lists; a
DatasetDict is a folder with `dataset_dict.json` and such a folder for each split (datasets, arrow_dataset.py). The
descriptions are no rows, and an Arrow file that state.json does not list is a cache of some `map`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora.errors import DataError
from qlora.foreign_json import ForeignFileError, ForeignModel, checked, load_object

STATE = "state.json"
_INFO, _SPLITS, _INFOS = "dataset_info.json", "dataset_dict.json", "dataset_infos.json"
_NO_ROWS = "files of the library datasets that hold no rows of the set"
_MAX_BYTES = 16 << 20
_SAVE_AGAIN = "write it anew: dataset.save_to_disk(…), or dataset.to_parquet(…)"
Name = Annotated[str, Field(max_length=1000)]


class _File(ForeignModel):
    filename: Name


class _State(ForeignModel):
    """The keys of state.json that say where rows are. Before version 2.8 a selection lay beside them, as indices."""

    data_files: Annotated[list[_File], Field(alias="_data_files", max_length=100_000)]
    indices: list[_File] | None = Field(None, alias="_indices_data_files")


class _Dictionary(ForeignModel):
    splits: Annotated[list[Name], Field(max_length=100_000)]


def dictionary(folder: Path) -> list[str]:
    """The splits of a saved DatasetDict, as its dataset_dict.json names them; none where it is no such folder."""
    try:
        return checked(_Dictionary, load_object(folder / _SPLITS, _MAX_BYTES, Path(_SPLITS)), _SPLITS).splits
    except (OSError, ForeignFileError):
        return []


def without_descriptions(
    names: Collection[str], real_path: Callable[[str], Path], leave_out: Callable[[str, str], None]
) -> set[str]:
    """The names (below a source's folder, with `/`) that are rows; other Arrow files are said to `leave_out`.

    `real_path` gives a file's place. Raises DataError for a saved data set that is not whole.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
    rows: set[str] = set()
    for folder, there in folders.items():
        kept = there - {_SPLITS, _INFOS}
        arrow = {name for name in there if name.endswith(".arrow")}
        if {STATE, _INFO} <= there:
            prefix = f"{folder}/" if folder else ""
            kept -= {STATE, _INFO} | (arrow - _listed(real_path(prefix + STATE), prefix, arrow))
        elif arrow:
            kept -= {STATE, _INFO, *(name for name in arrow if name.startswith("cache-"))}
        rows.update(f"{folder}/{name}" if folder else name for name in kept)
        for name in sorted(there - kept - {STATE, _INFO, _SPLITS}):
            leave_out(_NO_ROWS, f"{folder}/{name}" if folder else name)
    return rows


def _listed(state_file: Path, prefix: str, there: Collection[str]) -> set[str]:
    """The Arrow files that a state.json lists. Raises DataError where it is no such file, or one of them is missing."""
    shown = f"{prefix}{STATE}"
    try:
        state = checked(_State, load_object(state_file, _MAX_BYTES, Path(shown)), shown)
    except ForeignFileError as error:
        raise DataError(str(error), _SAVE_AGAIN) from error
    if state.indices:
        what = f"{shown}: the data set is a selection (_indices_data_files), which is kept in no row"
        raise DataError(what, "write it anew: dataset.flatten_indices().save_to_disk(…)")
    listed = {entry.filename for entry in state.data_files}
    if missing := sorted(listed - set(there)):
        what = f"{shown}: {len(missing):,} of its Arrow files are not there ({missing[0][:100]})"
        raise DataError(what, "copy the whole folder, or " + _SAVE_AGAIN)
    return listed
