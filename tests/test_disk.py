"""Folders appear whole or not at all, damage is found, and names from files stay inside their folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qlora import disk
from qlora.errors import RunFolderError


def fill(text: str):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(b"\0" * 100)

    return write


def test_publish_writes_a_manifest_that_verifies(tmp_path: Path) -> None:
    assert disk.publish_folder(tmp_path / "x", fill("hello"), {"kind": "tokens"}) == (105, None)
    assert disk.verify_folder(tmp_path / "x") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    disk.publish_folder(tmp_path / "x", fill("hello"))
    file = tmp_path / "x" / name
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[2] ^= 1
        file.write_bytes(raw)
    elif damage == "truncate":
        file.write_bytes(raw[:-1])
    else:
        file.unlink()
    assert name in (disk.verify_folder(tmp_path / "x") or "")


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    disk.publish_folder(tmp_path / "x", fill("old"))

    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        disk.publish_folder(tmp_path / "x", fail)
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.publish_folder(tmp_path / "x", fill("old"))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".tmp-qlora-" in source.name:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="No space"):
            disk.publish_folder(tmp_path / "x", fill("new"))
    assert (tmp_path / "x" / "a.txt").read_text() == "old" and disk.verify_folder(tmp_path / "x") is None
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_nobody_else_may_write_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        disk.publish_folder(tmp_path / "x", fill("hello"))
        disk.write_atomic(tmp_path / "y", "hello")
    finally:
        os.umask(before)
    for path in (tmp_path / "x", *(tmp_path / "x").rglob("*"), tmp_path / "y"):
        assert path.stat().st_mode & 0o022 == 0, path


def test_replacing_keeps_one_whole_folder(tmp_path: Path) -> None:
    disk.publish_folder(tmp_path / "x", fill("old"))
    disk.publish_folder(tmp_path / "x", fill("new"))
    assert (tmp_path / "x" / "a.txt").read_text() == "new" and disk.verify_folder(tmp_path / "x") is None


def test_the_manifest_is_flushed_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int | str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), sync(handle))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {Path(b).name}"), rename(a, b))[1])
    disk.publish_folder(tmp_path / "x", fill("hello"))
    # each file, the manifest last of them, and the folders; then the name; then the parent
    at = calls.index("rename x")
    inode = {path.name: path.stat().st_ino for path in (tmp_path, tmp_path / "x", *(tmp_path / "x").rglob("*"))}
    flushed = calls[:at]
    assert {inode[name] for name in ("a.txt", "b.bin", disk.MANIFEST, "sub", "x")} <= {*flushed}
    assert flushed.index(inode[disk.MANIFEST]) > max(flushed.index(inode[name]) for name in ("a.txt", "b.bin"))
    assert calls[at + 1 :] == [inode[tmp_path.name]]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    disk.publish_folder(tmp_path / "x", fill("hello"))
    (tmp_path / ".x.tmp-qlora-123-0a1b2c3d").mkdir()
    (tmp_path / ".y.json.tmp-qlora-9-00000000").touch()
    (tmp_path / ".recipe.toml.tmp-9").touch()  # as versions up to 0.5 named them
    (tmp_path / ".step-000050.old-9" / "checkpoint").mkdir(parents=True)
    shutil.copytree(tmp_path / "x", tmp_path / ".x.old-swap-9")  # anybody's name, and ours by its manifest
    theirs = (".hidden", ".notes.tmp-1", ".diary.old-2", ".thesis.old-swap-3", ".x.tmp-qlora-123", ".x.old-qlora-1-0")
    for name in theirs:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.old-qlora-1-00000000").symlink_to(tmp_path / "x")
    assert disk.sweep_leftovers(tmp_path) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, ".x.old-qlora-1-00000000", "x"])
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def test_set_aside_numbers_itself(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "x").mkdir()
        disk.set_aside(tmp_path / "x", ".broken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.broken1", "x.broken2", "x.broken3"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "link", "pipe", "..\\x"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "x").touch()
    (root / "link").symlink_to(tmp_path / "x")
    os.mkfifo(root / "pipe")
    with pytest.raises(ValueError):
        disk.inside(root, name)


def test_names_that_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "sub" / "x")
    assert disk.inside(tmp_path, "sub/x") == tmp_path / "sub/x"
    assert disk.inside(tmp_path, "link").is_file()


def test_links_of_a_hub_snapshot_are_inside(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert disk.inside(snapshot, "model.safetensors").is_file()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write here"):
        disk.make_folder(tmp_path / "file" / "sub")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert disk.cache_dir() == tmp_path


def test_hashes_keep_parts_apart() -> None:
    assert disk.sha256_text("ab", "c") != disk.sha256_text("a", "bc")
