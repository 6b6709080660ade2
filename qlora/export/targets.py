"""Where an export may be written: into a folder that is nobody's, or one that an earlier export made.

Looked at twice: at the door, by names and sizes, and in full when the new folder is about to take the name. Compared
are files, not spellings: on a disk that does not tell `Out` from `out`, or with a folder mounted twice, it is one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from qlora import disk, files, hub, manifest
from qlora.errors import ExportError, TargetTaken
from qlora.manifest import Standing
from qlora.recipe.pins import folder_split
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import DataSection
from qlora.run_record import is_run

_ELSEWHERE = "name another folder with `out`"


def check_place(folder: Path) -> None:
    """Whether an export may lie at `folder` at all. Raises ExportError. Reads no weight and no hash."""
    if why := files.unreachable(folder):
        raise ExportError(f"{folder}: cannot be an export's folder ({why})", _ELSEWHERE)
    if folder == folder.parent:
        raise ExportError(f"{folder}: cannot be an export's folder", _ELSEWHERE)
    for place in folder.parents:
        if place.exists() and not place.is_dir():
            raise ExportError(f"{place}: is a file, and {folder.name} cannot lie in it", _ELSEWHERE)
    for run in (folder, *folder.parents):
        if is_run(run):
            _check_in_run(folder, run)
    for what, cache in (("the hub's cache", hub.cache_folder()), ("the cache", disk.cache_dir())):
        if _lies_in(folder, cache):
            raise ExportError(f"{folder}: lies in {what} ({cache})", _ELSEWHERE)
    standing(folder, hashes=False)


def _check_in_run(folder: Path, run: Path) -> None:
    if folder.relative_to(run).parts[:1] != ("export",):
        raise ExportError(f"{folder}: lies in the run {run}, where only export/ is for exports", _ELSEWHERE)
    try:
        files.refuse_links(run, folder)
    except files.UnsafePathError as error:
        raise ExportError(str(error), _ELSEWHERE) from error


def standing(folder: Path, hashes: bool) -> Standing:
    """Whose the folder is. Raises TargetTaken where it is neither nobody's nor an earlier export."""
    found = manifest.standing(folder, hashes)
    if found.whose in ("ours", "changed") and found.kind != "export":
        raise TargetTaken(f"{folder}: is not an export (its manifest's kind is {str(found.kind)[:40]!r})", _ELSEWHERE)
    if found.whose == "foreign":
        raise TargetTaken(f"{folder}: exists and was not made by an export ({found.why})", f"{_ELSEWHERE}, or move it")
    return found


def keep_apart(folder: Path, adapter_dir: Path, base: Path, recipe: Recipe | None) -> None:
    """Raises ExportError where the export would lie in what it is made of, or would hold it: adapter, base, rows.

    Exports of a run lie in its own `export/`, wherever the run lies.
    """
    own = is_run(adapter_dir.parent) and _lies_in(folder, adapter_dir.parent / "export")
    for what, place, is_whole in (("the adapter", adapter_dir, True), ("the base", base, True), *_rows(recipe)):
        if _lies_in(place, folder):
            raise ExportError(f"{folder}: holds {what} that is exported ({place})", _ELSEWHERE)
        if is_whole and not own and _lies_in(folder, place):
            raise ExportError(f"{folder}: lies in {what} that is exported ({place})", _ELSEWHERE)


def _rows(recipe: Recipe | None) -> Iterator[tuple[str, Path, bool]]:
    """Where the rows of a run lie; True for a folder all of which is read."""
    data = recipe.data if recipe else DataSection()
    sources = (source.path for source in (*data.train, *data.eval))
    for path in (*sources, *(source.path for source in data.documents)):
        whole = place = folder_split(path)[0]
        while glob.has_magic(place) and not os.path.lexists(place):
            place = os.path.dirname(place)
        if os.path.isabs(place):
            yield "the rows", Path(place), place == whole


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is the folder or lies below it."""
    if path.is_relative_to(folder):
        return True
    try:
        wanted = folder.stat()
    except OSError:
        return False
    return any(_is_same(place, wanted) for place in (path, *path.parents))


def _is_same(place: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(place.stat(), wanted)
    except OSError:
        return False
