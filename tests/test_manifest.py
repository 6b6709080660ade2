"""Whose a folder is: what its manifest says, and whether that is still true."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import disk, foreign_json, manifest
from qlora.version import __version__


def fill(to: Path) -> None:
    (to / "a.txt").write_text("hello")
    (to / "sub").mkdir()
    (to / "sub" / "b.bin").write_bytes(b"\0" * 100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    disk.publish_folder(tmp_path / "x", fill, {"kind": "export", "of": {"adapter": "tiny"}})
    return tmp_path / "x"


def test_a_manifest_says_what_made_it_of_what_and_lists_every_file(folder: Path) -> None:
    said = manifest.read(folder)
    assert (said["made_by"], said["version"], said["kind"], said["of"]) == (
        *("qlora", __version__, "export", {"adapter": "tiny"}),
    )
    assert {name: entry["bytes"] for name, entry in said["files"].items()} == {"a.txt": 5, "sub/b.bin": 100}
    assert manifest.standing(folder, hashes=True).whose == "ours" and manifest.verify(folder) is None


def seal(folder: Path, content: dict[str, Any]) -> None:
    (folder / manifest.MANIFEST).write_text(manifest.sealed(content))


def older(folder: Path) -> dict[str, Any]:
    """The manifest as versions up to 0.5 wrote it."""
    return {"files": manifest.read(folder)["files"]}


def test_an_older_manifest_counts_and_is_an_exports_by_its_files(folder: Path) -> None:
    seal(folder, older(folder))
    assert (found := manifest.standing(folder, hashes=True)).whose == "ours" and found.kind is None
    (folder / "export.json").write_text("{}")
    files = {**older(folder)["files"], "export.json": {"sha256": disk.sha256_file(folder / "export.json"), "bytes": 2}}
    seal(folder, {"files": files})
    assert (found := manifest.standing(folder, hashes=True)).whose == "ours" and found.kind == "export"


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is edited": (lambda folder: (folder / "a.txt").write_text("hello!"), "a.txt has 6 bytes, not 5"),
    "a file is gone": (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
    "a file is added": (lambda folder: (folder / "notes.txt").write_text(""), "notes.txt was added"),
    "a file is added below": (lambda folder: (folder / "sub" / "notes.txt").write_text(""), "sub/notes.txt was added"),
    "a hidden file is added": (lambda folder: (folder / ".notes").write_text(""), ".notes was added"),
    "an empty folder is added": (lambda folder: (folder / "new").mkdir(), "new was added"),
    "a link is added": (lambda folder: (folder / "new").symlink_to("a.txt"), "new was added"),
    "a pipe is added": (lambda folder: os.mkfifo(folder / "new"), "new was added"),
    "a file becomes a link": (
        lambda folder: ((folder / "a.txt").rename(folder / "sub" / "a"), (folder / "a.txt").symlink_to("sub/a")),
        "",
    ),
    "a file becomes a folder": (lambda folder: ((folder / "a.txt").unlink(), (folder / "a.txt").mkdir()), ""),
    "a folder becomes a link": (
        lambda folder: ((folder / "sub").rename(folder / "deep"), (folder / "sub").symlink_to("deep")),
        "",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_names_and_sizes_tell_a_change(folder: Path, name: str) -> None:
    change, why = CHANGES[name]
    change(folder)
    for hashes in (False, True):
        found = manifest.standing(folder, hashes)
        assert found.whose == "changed" and why in found.why and found.kind == "export"


def test_only_hashes_tell_a_change_of_the_same_size(folder: Path) -> None:
    (folder / "a.txt").write_text("hallo")
    assert manifest.standing(folder, hashes=False).whose == "ours"
    assert manifest.standing(folder, hashes=True).whose == "changed"


def test_nobodys_and_foreign_ones(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for nobody in ("none", "empty"):
        assert manifest.standing(tmp_path / nobody, hashes=True).whose == "nobody"
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "dangling").symlink_to("none")
    for foreign in ("link", "dangling", "x/a.txt", "x/sub"):
        assert manifest.standing(tmp_path / foreign, hashes=True).whose == "foreign"


@pytest.mark.parametrize("text", ["", "[]", "[" * 9999, '{"files": []}', '{"sha256": 1e999}', "\0" * 99, "9" * 10_000])
def test_what_is_no_manifest_is_said_in_words(folder: Path, text: str) -> None:
    (folder / manifest.MANIFEST).write_text(text)
    assert manifest.standing(folder, hashes=True).whose == "foreign"
    assert "manifest.json" in (manifest.verify(folder) or "")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/../../x", "", "a\0b", "..\\x"])
def test_a_manifest_that_names_files_elsewhere_is_none_of_ours(folder: Path, name: str) -> None:
    seal(folder, {**older(folder), "files": {name: {"sha256": "0" * 64, "bytes": 1}}})
    assert manifest.standing(folder, hashes=False).whose == "foreign"
    assert "is not a file's name" in (manifest.verify(folder) or "")


def test_it_protects_itself(folder: Path) -> None:
    said = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / manifest.MANIFEST).write_text(json.dumps({**said, "kind": "tokens"}))
    assert "its own sha256 differs" in (manifest.verify(folder) or "")
    assert manifest.standing(folder, hashes=False).whose == "foreign"


def test_a_stamp_tells_that_nothing_was_written_in_between(folder: Path) -> None:
    before = manifest.standing(folder, hashes=True).stamp
    renamed = folder.rename(folder.with_name("y"))
    assert manifest.stamp_of(manifest.contents(renamed)) == before
    (renamed / "a.txt").write_text("hallo")
    assert manifest.stamp_of(manifest.contents(renamed)) != before


def test_reading_needs_a_folder_of_ours(tmp_path: Path) -> None:
    with pytest.raises(foreign_json.ForeignFileError, match="cannot be read"):
        manifest.read(tmp_path)


def test_hashes_keep_parts_apart() -> None:
    assert manifest.sha256_text("ab", "c") != manifest.sha256_text("a", "bc")
