"""Damaged checkpoints: every flipped bit and every cut is found, the one before is used, nothing is thrown away."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from qlora import disk
from qlora.disk import MANIFEST
from qlora.events import Notice, Recorder
from qlora.model.identity import Fingerprints
from qlora.training import checkpoint
from qlora.training.checkpoint import RunState
from tests.training.cases import ABOUT, optimizer

FLIPS = 64
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoint.snapshot(folder, RunState(step=step, seconds=0.1), optimizer(), Fingerprints("b", "d"), 2, ABOUT)()
    return folder


def copy_of(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    return folder, checkpoint.folder_of(folder, 2)


def expect_the_one_before(folder: Path) -> str:
    """Step 1 is used; step 2 is set aside, not deleted, and said. Returns what was said."""
    sink = Recorder()
    found = checkpoint.newest(folder, sink)
    assert found is not None and found.state == RunState(step=1, seconds=0.1)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002.broken1"]
    (notice,) = [event for event in sink.events if isinstance(event, Notice)]
    assert "step-000002 is damaged" in notice.message
    return notice.message


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(run: Path, tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    for _ in range(FLIPS):
        folder, newest = copy_of(run, tmp_path)
        data = bytearray((newest / name).read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (newest / name).write_bytes(data)
        expect_the_one_before(folder)


@pytest.mark.parametrize("keep", ["nothing", "one byte", "all but one", "no file"])
@pytest.mark.parametrize("name", FILES)
def test_every_cut_is_found(run: Path, tmp_path: Path, name: str, keep: str) -> None:
    folder, newest = copy_of(run, tmp_path)
    data = (newest / name).read_bytes()
    if keep == "no file":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes({"nothing": b"", "one byte": data[:1], "all but one": data[:-1]}[keep])
    expect_the_one_before(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{}", '{"files": []}', '{"files": {}}', '{"files": {"../../x": {}}}', "[" * 50_000, '{"files": 5}'],
)
def test_manifests_that_are_no_manifests(run: Path, tmp_path: Path, content: str) -> None:
    folder, newest = copy_of(run, tmp_path)
    (newest / MANIFEST).write_text(content)
    expect_the_one_before(folder)


def test_a_manifest_of_other_files_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    """A manifest that verifies, of a folder that lacks the state."""
    folder, newest = copy_of(run, tmp_path)
    shutil.rmtree(newest)
    disk.publish_folder(newest, lambda place: (place / "x").write_text("y") and None)
    assert "state.json" in expect_the_one_before(folder)


def test_a_state_of_another_format_is_set_aside(run: Path, tmp_path: Path) -> None:
    folder, newest = copy_of(run, tmp_path)
    state = json.loads((newest / "state.json").read_text())
    files = {name: (newest / name).read_bytes() for name in FILES[:2]}
    shutil.rmtree(newest)

    def write(place: Path) -> None:
        for name, data in files.items():
            (place / name).write_bytes(data)
        (place / "state.json").write_text(json.dumps(state | {"format": 99}))

    disk.publish_folder(newest, write)
    assert "format is wrong: Input should be 2 (it is 99)" in expect_the_one_before(folder)


def test_without_a_good_one_there_is_none(run: Path, tmp_path: Path) -> None:
    folder, newest = copy_of(run, tmp_path)
    for step in (1, 2):
        (checkpoint.folder_of(folder, step) / "state.json").write_text("{}")
    assert checkpoint.newest(folder, Recorder()) is None
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-000001.broken1", "step-000002.broken1"]


def test_a_checkpoint_holds_nothing_that_runs(run: Path) -> None:
    """No zip, no pickle, nothing executable, nothing that others may write."""
    for path in checkpoint.folder_of(run, 2).iterdir():
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        assert path.stat().st_mode & 0o133 == 0, oct(path.stat().st_mode)


def test_at_no_moment_fewer_than_keep_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before each rename and removal, over ten saves."""
    import os

    keep, counts = 2, []
    saved = [0]
    real_rename, real_rmtree = os.rename, shutil.rmtree

    def look() -> None:
        folders = (tmp_path / "checkpoints").glob("step-*")
        counts.append(sum(disk.verify_folder(folder) is None for folder in folders) - min(keep, saved[0]))

    def rename(*arguments: object, **named: object) -> None:
        look()
        real_rename(*arguments, **named)  # type: ignore[arg-type]
        look()

    def rmtree(*arguments: object, **named: object) -> None:
        look()
        real_rmtree(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    made = optimizer()
    for step in range(1, 11):
        checkpoint.snapshot(tmp_path, RunState(step=step), made, Fingerprints("b", "d"), keep, ABOUT)()
        saved[0] = step
    assert len(counts) > 20 and min(counts) >= 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == keep
