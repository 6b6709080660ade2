"""How a recipe names rows of the hub, their revisions as commits, and a split of a folder."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER_SPLIT = re.compile(r"(?P<folder>.+):(?P<split>[\w.-]+)", re.DOTALL)
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")


class HubRows(NamedTuple):
    """Rows of a data set of the hub; written `hub:NAME[@revision][:split]`. `split` is "" where none is named."""

    name: str
    revision: str
    split: str

    def __str__(self) -> str:
        return f"hub:{self.name}@{self.revision}" + (f":{self.split}" if self.split else "")


def parse_hub_rows(path: str) -> HubRows | None:
    """The rows that a source's path names (by default of main); None for anything else."""
    match = _HUB_ROWS.fullmatch(path)
    return HubRows(match["name"], match["revision"] or "main", match["split"] or "") if match else None


def folder_split(path: str) -> tuple[str, str]:
    """`folder:SPLIT` as the two; (path, "") for anything else: what exists under the whole name, a drive's letter."""
    drive, rest = os.path.splitdrive(path)
    match = _FOLDER_SPLIT.fullmatch(rest)
    return (path, "") if match is None or os.path.lexists(path) else (drive + match["folder"], match["split"])
