"""Folders of artifacts under way, filled by hand: what tests of them share."""

from __future__ import annotations

from pathlib import Path

from qlora.export.staging import StagedExport

WORK = {"adapter": "a", "dtype": "bf16"}


def piece(item: int) -> bytes:
    return bytes([item % 251]) * (1000 + item)


class Killed(BaseException):
    """Leaves staged folders as a kill would: nothing of the writer runs any more."""


def fill(staged: StagedExport, keys: tuple[str, ...], items: int = 20, until: int = 99) -> None:
    for item in range(1, items + 1):
        if item > staged.start:
            for key in keys:
                staged.append(key, f"part{item // 8}.bin", piece(item))
            if item == until:
                raise Killed
            staged.checkpoint(item)
    for key in keys:
        (staged.folder(key) / "config.json").write_text("{}")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
