"""A disk full of somebody's own files, with a run among them: what an export or a run must not touch."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora import disk, run_folder
from qlora.cli import common
from qlora.recipe.reading import load_recipe
from tests.export.cases import KINDS, trained
from tests.runs import write_rows

THESIS = "Chapter 1. Ten years of work."


@dataclass(frozen=True)
class World:
    """`home` holds all of it: documents, photographs, a base, rows, and a run with its adapter."""

    home: Path

    @property
    def base(self) -> Path:
        return self.home / "models" / "base"

    @property
    def rows(self) -> Path:
        return self.home / "rows"

    @property
    def run(self) -> Path:
        return self.home / "runs" / "tiny"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def recipe(self) -> Path:
        return self.home / "tiny.toml"

    @property
    def thesis(self) -> Path:
        return self.home / "thesis.txt"

    @property
    def photos(self) -> Path:
        return self.home / "photos"

    def folder(self, name: str, **files: str) -> Path:
        """A folder of theirs with such files (`index_html="…"` is index.html)."""
        place = self.home / name
        place.mkdir(parents=True, exist_ok=True)
        for file, text in {"index_html": "<html>", **files}.items():
            (place / file.replace("_", ".")).write_text(text)
        return place

    def snapshot(self) -> dict[str, tuple[Any, ...]]:
        """Every file, folder, link and pipe with its mode and bytes."""
        found: dict[str, tuple[Any, ...]] = {}
        for place, folders, names in os.walk(self.home):
            for name in (*folders, *names):
                path = Path(place) / name
                status = path.lstat()
                content: Any = None
                if path.is_symlink():
                    content = os.readlink(path)
                elif stat.S_ISREG(status.st_mode):
                    content = path.read_bytes() if status.st_size < 1 << 26 else status.st_size
                found[str(path.relative_to(self.home))] = (status.st_mode, status.st_ino, content)
        return found


def make_world(home: Path, base: Path) -> World:
    world = World(home)
    shutil.copytree(base, world.base)
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "1997.jpg").write_bytes(b"\xff\xd8" + bytes(range(256)))
    world.thesis.write_text(THESIS)
    world.rows.mkdir()
    write_rows(world.rows / "train.jsonl")
    world.recipe.write_text(
        f'[model]\nbase = "{world.base}"\n[[data.train]]\npath = "rows"\n[output]\ndir = "{home / "runs"}"\n'
    )
    world.run.mkdir(parents=True)
    run_folder.claim(world.run, "new").release()
    run_folder.write_recipe(world.run, load_recipe(world.recipe), None)
    (world.run / "events.jsonl").write_text(json.dumps({"event": "start", "run_dir": str(world.run)}) + "\n")
    disk.publish_folder(
        world.run / "checkpoints" / "step-000001",
        lambda to: (to / "a").write_text("a") and None,
        {"kind": "checkpoint"},
    )
    trained(world.base, home / "made", KINDS["plain"])
    disk.publish_folder(
        world.adapter, lambda to: shutil.copytree(home / "made", to, dirs_exist_ok=True) and None, {"kind": "adapter"}
    )
    shutil.rmtree(home / "made")
    return world


def another(world: World, home: Path) -> World:
    """The same world elsewhere: its own base, rows and run."""
    shutil.copytree(world.home, home)
    for path in home.rglob("*"):
        if path.suffix in (".toml", ".json", ".jsonl") and str(world.home) in (text := path.read_text()):
            path.write_text(text.replace(str(world.home), str(home)))
    (home / "runs" / "tiny" / "adapter" / disk.MANIFEST).unlink()
    made = home / "runs" / "tiny" / "adapter"
    filled = made.rename(made.with_name("made"))
    disk.publish_filled(filled, made, {}, {"kind": "adapter"})
    return World(home)


def refused(work: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of work that it refuses, in two lines and with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        common.run(lambda: work() and None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 2, (end.value.code, lines)
    return lines[0]
