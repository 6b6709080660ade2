"""Opening what came from outside: links, pipes, devices and homes that do not exist."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from io import IOBase
from pathlib import Path

import pytest

from qlora import files
from qlora.errors import UserError
from qlora.files import UnsafePathError


def test_a_users_path_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert files.user_path(tmp_path / "link") == tmp_path / "real"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/link/x") == tmp_path / "real" / "x"


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "circle", "circle/x", "\ud800", "caf\udce9"])
def test_a_users_path_that_is_none_is_an_error_of_two_lines(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError) as error:
        files.user_path(path, "`out`")
    assert error.value.what.startswith("`out`: ") and error.value.hint


def test_names_stay_inside_and_come_back_resolved(tmp_path: Path) -> None:
    root = tmp_path / "snapshots" / "abc"
    blobs = tmp_path / "blobs"
    for folder in (root / "sub", blobs, tmp_path / "other"):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("x")
    (root / "config.json").symlink_to("../../blobs/123")
    (root / "sub" / "near").symlink_to("../sub")
    (root / "far").symlink_to(tmp_path / "other")
    os.mkfifo(root / "pipe")
    assert files.inside(root, "config.json") == blobs / "123"
    assert files.inside(root, "sub/near") == root / "sub"
    assert files.inside(root, "not/yet") == root / "not" / "yet"
    for name in ("far", "far/x", "pipe", "/etc/passwd", "../other", "sub/../../x", "", "a\0b", "a\\b"):
        with pytest.raises(UnsafePathError):
            files.inside(root, name)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert files.read_bytes(file, 5) == b"12345"
    for name in ("link", "pipe", "."):
        with pytest.raises(UnsafePathError):
            files.open_to_read(tmp_path / name)
    with pytest.raises(UnsafePathError, match="5 bytes are too many"):
        files.open_to_read(file, 4)
    with pytest.raises(UnsafePathError):
        files.open_to_read(Path("/dev/zero"))


@pytest.mark.parametrize("way", ["new", "replace", "append", "update"])
def test_nothing_is_written_through_a_link(way: files.WayToWrite, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.write_text("years of work")
    (tmp_path / "link").symlink_to(thesis)
    os.link(thesis, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "hard", "pipe"):
        with pytest.raises((UnsafePathError, FileExistsError)):
            files.open_to_write(tmp_path / name, way)
    assert thesis.read_text() == "years of work"
    with files.open_to_write(tmp_path / "own", way) as file:
        file.write(b"x")
    assert (tmp_path / "own").read_bytes() == b"x"


def test_ways_to_write(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for way, content in (("new", b"ab"), ("append", b"abcd"), ("update", b"cdcd"), ("replace", b"cd")):
        with files.open_to_write(file, way) as stream:  # type: ignore[arg-type]
            stream.write(b"ab" if way == "new" else b"cd")
        assert file.read_bytes() == content


OPENINGS: dict[str, Callable[[Path], IOBase]] = {
    "read": files.open_to_read,
    "replace": lambda file: files.open_to_write(file, "replace"),
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
@pytest.mark.parametrize("way", OPENINGS)
def test_ctrl_c_while_a_file_is_opened_closes_its_number_once(way: str, tmp_path: Path) -> None:
    """Some hundred times, at any moment: closed twice, the number is perhaps another thread's file by then."""
    file, chance = tmp_path / "file", random.Random(5)
    file.write_bytes(b"x")
    opened = interrupted = 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while opened < 4000:
            try:
                while opened < 4000:
                    opened += 1
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 6e-5))
                    OPENINGS[way](file).close()
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:  # and no error of a number that is closed already
                interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 100


def test_links_between_a_folder_and_a_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("../elsewhere")
    (tmp_path / "named").symlink_to("run")
    with pytest.raises(UnsafePathError, match="checkpoints is a link"):
        files.refuse_links(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-1")
    files.refuse_links(tmp_path / "named", tmp_path / "named" / "adapter" / "x")


def test_a_path_that_no_system_call_takes(tmp_path: Path) -> None:
    assert files.unreachable(tmp_path) is None and files.unreachable(tmp_path / "none" / "x") is None
    (tmp_path / "file").touch()
    assert files.unreachable(tmp_path / "file" / "x") is None
    assert "too long" in (files.unreachable(tmp_path / ("x" * 256)) or "")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\udcff").mkdir()
    with pytest.raises(UserError, match=r"`out`: .*a\\xff has a name that is not UTF-8"):
        files.user_path(tmp_path / "a\udcff", "`out`")
