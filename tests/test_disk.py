"""Folders appear whole or not at all, damage is found, and names from files stay inside their folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qlora import disk, manifest
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


CHANGES = {
    "a file is edited": lambda folder: (folder / "a.txt").write_text("mine"),
    "a file of that size is edited": lambda folder: (folder / "a.txt").write_text("OLD"),
    "a file is added": lambda folder: (folder / "notes").write_text("mine"),
    "a file is removed": lambda folder: (folder / "a.txt").unlink(),
    "its manifest is gone": lambda folder: (folder / disk.MANIFEST).unlink(),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after it was looked at"])
def test_what_was_changed_is_set_aside_and_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    """Also where somebody edits it in the moment between the look and the rename."""
    final = tmp_path / "x"
    disk.publish_folder(final, fill("old"))
    kept: dict[str, bytes] = {}
    if when == "before":
        CHANGES[change](final)
        kept = tree(final)
    else:
        real = manifest.standing

        def standing(folder: Path, hashes: bool) -> manifest.Standing:
            found = real(folder, hashes)
            CHANGES[change](final)
            kept.update(tree(final))
            return found

        monkeypatch.setattr(manifest, "standing", standing)
    published = disk.publish_folder(final, fill("new"))
    monkeypatch.undo()
    assert published.aside is not None and published.aside.folder == tmp_path / "x.1"
    assert published.aside.bytes == sum(map(len, tree(tmp_path / "x.1").values()))
    assert kept and tree(tmp_path / "x.1") == kept
    assert (final / "a.txt").read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.1"]


def test_a_folder_that_is_filled_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was empty when it was looked at."""
    final = tmp_path / "x"
    final.mkdir()
    real = manifest.standing

    def standing(folder: Path, hashes: bool) -> manifest.Standing:
        found = real(folder, hashes)
        (final / "mine").write_text("mine")
        return found

    monkeypatch.setattr(manifest, "standing", standing)
    with pytest.raises(OSError):
        disk.publish_folder(final, fill("new"))
    assert tree(final) == {"mine": b"mine"} and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_lost_its_name_while_somebody_wrote_in_it_is_kept(tmp_path: Path) -> None:
    """A kill between two renames: the old folder has a hidden name, and a file of somebody in it."""
    disk.publish_folder(tmp_path / "x", fill("new"))
    disk.publish_folder(tmp_path / ".x.swap-qlora-1-00000000", fill("old"))
    (tmp_path / ".x.swap-qlora-1-00000000" / "notes").write_text("mine")
    disk.sweep_leftovers(tmp_path)
    assert (tmp_path / "x.1" / "notes").read_text() == "mine" and (tmp_path / "x" / "a.txt").read_text() == "new"
    (tmp_path / "x.1").rename(tmp_path / ".x.swap-qlora-1-00000000")
    shutil.rmtree(tmp_path / "x")
    disk.sweep_leftovers(tmp_path)
    assert (tmp_path / "x" / "notes").read_text() == "mine"


def test_only_the_leftovers_of_one_name_are_swept_where_that_is_asked(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / f".{name}.tmp-qlora-4194305-00000000").mkdir()
    assert disk.sweep_leftovers(tmp_path, spare_running=True, name="x") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".y.tmp-qlora-4194305-00000000"]


def test_a_folder_is_removed_while_nothing_was_added(tmp_path: Path) -> None:
    """Old checkpoints go, and not one that somebody keeps notes in, or only looks like one."""
    for name in ("ours", "noted"):
        disk.publish_folder(tmp_path / name, fill("old"))
    (tmp_path / "noted" / "notes").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").touch()
    for name in ("ours", "noted", "theirs"):
        disk.remove_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noted", "theirs"]


def test_a_folder_above_is_not_made_anew(tmp_path: Path) -> None:
    """A run's folder that is gone stays gone."""
    with pytest.raises(FileNotFoundError):
        disk.publish_folder(tmp_path / "run" / "checkpoints" / "step-000001", fill("new"))
    with pytest.raises(FileNotFoundError):
        disk.write_atomic(tmp_path / "run" / "recipe.toml", "new")
    assert not list(tmp_path.iterdir())


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


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write here"):
        disk.make_folder(tmp_path / "file" / "sub")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    assert disk.cache_dir() == tmp_path


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "名" * 85])
def test_a_file_of_the_longest_name_is_written(tmp_path: Path, name: str) -> None:
    for text in ("one", "two"):
        disk.write_atomic(tmp_path / name, text)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "two")]
    left = disk.hidden(tmp_path / name, "tmp")
    left.touch()
    assert disk.sweep_leftovers(tmp_path) == 1 and not left.exists()
