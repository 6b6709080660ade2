"""How a recipe names rows of the hub, and their revisions as commits."""

from __future__ import annotations

import re
from typing import NamedTuple

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ROWS = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<split>[\w.-]+))?")


class HubRows(NamedTuple):
    """Rows of a data set of the hub; written `hub:NAME[@revision][:split]`."""

    name: str
    revision: str
    split: str

    def __str__(self) -> str:
        return f"hub:{self.name}@{self.revision}:{self.split}"


def parse_hub_rows(path: str) -> HubRows | None:
    """The rows that a source's path names (by default the split train of main); None for anything else."""
    match = _HUB_ROWS.fullmatch(path)
    return HubRows(match["name"], match["revision"] or "main", match["split"] or "train") if match else None
