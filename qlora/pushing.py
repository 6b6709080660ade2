"""Exports that are there already, sent to a repository of the hub as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora import files, manifest
from qlora.errors import ExportError
from qlora.events import Sink
from qlora.export.parcel import PublishedFolder
from qlora.export.push import Contents, Destination, Push, Pushed, open_destination
from qlora.notebook import at_work


def push_exports(exports: str | Path | Sequence[str | Path], push: Push, *, sink: Sink | None = None) -> Pushed:
    """Send exports that are there (their folders, or files in them) to a repository of the hub, as they are.

    Raises ExportError for what is no verified export, has changed since, or holds what must not leave this machine.
    """
    places = [exports] if isinstance(exports, str | Path) else exports
    folders = [_export_folder(files.user_path(place, "the export")) for place in places]
    opened = [PublishedFolder.open(folder) for folder in dict.fromkeys(folders)]
    with at_work(sink) as (shared, _):
        destination = open_destination(push, Contents.of(opened))
        return delivered(destination, [one.path for one in opened], shared)


def are_exports(places: Sequence[str | Path]) -> bool:
    """Whether each is the folder of an export, or a file in one."""
    return all(
        manifest.standing(_export_folder(files.user_path(place, "the export")), hashes=False).kind == "export"
        for place in places
    )


def delivered(destination: Destination, places: Sequence[Path], sink: Sink) -> Pushed:
    """What is pushed; an error says that the exports are there."""
    try:
        return destination.deliver(places, sink)
    except ExportError as error:
        shown = ", ".join(map(str, places))
        raise ExportError(error.what, f"{error.hint}; the export itself is done: {shown}") from error


def _export_folder(place: Path) -> Path:
    return place.parent if place.is_file() else place
