"""Rows from data sets of the hub: downloaded, and known by the commit that they are of."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qlora import hub
from qlora.errors import DataError
from qlora.events import Sink
from qlora.recipe.pins import parse_hub_rows
from qlora.recipe.sections import DataSection, SourceSection

ROW_FILES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class LocalRows:
    """`local` has the paths of files in the place of `hub:` sources; `pinned` their names with commits, to record."""

    local: DataSection
    pinned: DataSection


def localize(data: DataSection, sink: Sink) -> LocalRows:
    """The sections with every `hub:` source downloaded; everything below reads files only. Raises DataError."""
    local: dict[str, tuple[SourceSection, ...]] = {}
    pinned: dict[str, tuple[SourceSection, ...]] = {}
    for side in ("train", "eval"):
        sources = [(section, *download_rows(section.path, sink)) for section in getattr(data, side)]
        local[side] = tuple(section.model_copy(update={"path": path}) for section, path, _ in sources)
        pinned[side] = tuple(section.model_copy(update={"path": path}) for section, _, path in sources)
    return LocalRows(data.model_copy(update=local), data.model_copy(update=pinned))


def download_rows(source: str, sink: Sink) -> tuple[str, str]:
    """A source's path as a pattern of local files, and as what a run records; both as it stands but for the hub's.

    Of a data set `hub:NAME[@revision][:split]`, the rows of a split (train unless named) are the data files in one
    folder whose names begin with it. Raises DataError.
    """
    if not source.startswith("hub:"):
        return source, source
    rows = parse_hub_rows(source)
    if rows is None:
        what = f"{source}: is not of the form hub:NAME[@revision][:split]"
        raise DataError(what, "for example hub:tatsu-lab/alpaca, or hub:owner/name@main:train")
    wanted = [f"{place}{rows.split}*{ending}" for place in ("", "*/") for ending in ROW_FILES]
    snapshot = hub.look_up(hub.Repository(rows.name, rows.revision, "dataset"), wanted, sink)
    chosen = sorted(name for name in snapshot.files if any(fnmatch(name, pattern) for pattern in wanted))
    folder, ending = _one_set(snapshot.repository, rows.split, chosen)
    place = snapshot.fetch(chosen, sink) / folder
    return f"{glob.escape(str(place))}/{rows.split}*{ending}", str(rows._replace(revision=snapshot.commit))


def _one_set(repository: hub.Repository, split: str, files: Iterable[str]) -> tuple[str, str]:
    """Folder and ending of a split's files: one of each, or else it is not clear which are meant."""
    kinds = sorted({(str(Path(name).parent), Path(name).suffix) for name in files})
    if not kinds:
        what = f"no file of the split {split!r} as {', '.join(ROW_FILES)}"
        raise repository.error(what, "name another split, or download the rows and give their path")
    if len(kinds) > 1:
        what = f"the split {split!r} stands in several places ({', '.join(place + '/*' + end for place, end in kinds)})"
        raise repository.error(what, "download the rows and give their path")
    return kinds[0]
