"""Which files a source is: names and patterns as they stand, links only where they stay, each file as it was found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora.data import source_files as module
from qlora.data.source_files import FoundFiles, find_files
from qlora.errors import DataError
from qlora.shown import one_line

ENDINGS = (".jsonl", ".txt")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(found: FoundFiles) -> list[str]:
    return [file.name for file in found.files]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data [v2]/*.jsonl", ["a.jsonl", "b[1].jsonl"]),
        ("data [v2]/b[1].jsonl", ["b[1].jsonl"]),
        ("data [v2]/[ac].jsonl", ["a.jsonl"]),
        ("data ?v2]/a.jsonl", ["data [v2]/a.jsonl"]),
        ("data [[]v2]/a.jsonl", ["data [v2]/a.jsonl"]),
        ("*/b[1].jsonl", ["data [v2]/b[1].jsonl"]),
        ("data [v2]/**/*.jsonl", ["a.jsonl", "b[1].jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
        ("**/er/*", ["data [v2]/deep/er/d.jsonl"]),
        ("**/deep/**", ["data [v2]/deep/c.jsonl", "data [v2]/deep/er/d.jsonl"]),
        ("**/deep/**/d.jsonl", ["data [v2]/deep/er/d.jsonl"]),
        ("data [v2]/.hidden/*.jsonl", ["e.jsonl"]),
        ("data [v2]/.h*/*.jsonl", [".hidden/e.jsonl"]),
        ("data [v2]", ["a.jsonl", "b[1].jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
        ("data [v2]/", ["a.jsonl", "b[1].jsonl", "deep/c.jsonl", "deep/er/d.jsonl"]),
    ],
)
def test_patterns_match_what_glob_matches_and_what_exists_is_no_pattern(
    tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    below = ("a.jsonl", "b[1].jsonl", "deep/c.jsonl", "deep/er/d.jsonl", ".hidden/e.jsonl", "deep/.f.jsonl", "g.md")
    make(tmp_path / "data [v2]", *below)
    assert names(find_files(f"{tmp_path}/{pattern}", ENDINGS)) == expected


def test_links_that_leave_the_folder_are_left_out_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make(tmp_path, "diary.txt", "private/letter.txt", "data/rows.jsonl", "data/.store/v3.jsonl")
    (data / "notes.txt").symlink_to(tmp_path / "diary.txt")
    (data / "up.txt").symlink_to("../diary.txt")
    (data / "more").symlink_to(tmp_path / "private")
    (data / "gone.txt").symlink_to(tmp_path / "nothing")
    (data / "circle.txt").symlink_to("circle.txt")
    (data / "readme").symlink_to(tmp_path / "diary.txt")  # no data file by its name
    (data / "again.jsonl").symlink_to("rows.jsonl")
    (data / "latest").symlink_to(".store")
    (data / "newest").symlink_to(".store")  # once is enough
    for path in (str(data), f"{data}/**/*"):
        if path.endswith("*"):
            (data / "readme").unlink()
        found = find_files(path, ENDINGS)
        assert names(found) == ["again.jsonl", "latest/v3.jsonl", "rows.jsonl"]
        assert {(count, frozenset(listed)) for _, count, listed in found.left_out} == {
            (5, frozenset({"circle.txt", "gone.txt", "more", "notes.txt", "up.txt"}))
        }
    assert all(file.path.is_relative_to(data) and not file.path.is_symlink() for file in found.files)


def test_what_is_left_out_is_in_the_error_when_nothing_is_left(tmp_path: Path) -> None:
    make(tmp_path, "diary.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").symlink_to(tmp_path / "diary.txt")
    os.mkfifo(tmp_path / "data" / "pipe.jsonl")
    for path, start in (("data", "no data file in this folder"), ("data/*", "no file matches")):
        with pytest.raises(DataError, match=start) as caught:
            find_files(f"{tmp_path}/{path}", ENDINGS)
        assert "1 links that end outside of the folder or nowhere left out: notes.txt" in caught.value.what
        assert "1 pipes, devices or sockets left out: pipe.jsonl" in caught.value.what


def test_a_circle_of_folders_has_an_end(tmp_path: Path) -> None:
    make(tmp_path / "data", "rows.jsonl", "deep/more.jsonl")
    for name, target in (("a", "."), ("deep/up", ".."), ("b", "deep"), ("deep/self", ".")):
        (tmp_path / "data" / name).symlink_to(target)
    for path in ("data", "data/**/*.jsonl", "data/**/**/**/*.jsonl"):
        assert names(find_files(f"{tmp_path}/{path}", ENDINGS)) == ["deep/more.jsonl", "rows.jsonl"]
    # Named step by step, a link is a folder like any other, and as deep as the pattern is.
    assert names(find_files(f"{tmp_path}/data/*/rows.jsonl", ENDINGS)) == ["a/rows.jsonl"]


def test_a_path_that_the_user_names_may_be_a_link_and_is_resolved_once(tmp_path: Path) -> None:
    make(tmp_path / "real", "rows.jsonl", "v3.txt")
    (tmp_path / "data").symlink_to("real")
    (tmp_path / "rows.jsonl").symlink_to("real/v3.txt")
    for path in ("data", "data/*.jsonl", "data/rows.jsonl"):
        found = find_files(f"{tmp_path}/{path}", ENDINGS)
        assert found.files[0].path == tmp_path / "real" / "rows.jsonl" and not found.left_out
    (one,) = find_files(f"{tmp_path}/rows.jsonl", ENDINGS).files
    assert (one.name, one.ending, one.path) == ("rows.jsonl", ".jsonl", tmp_path / "real" / "v3.txt")


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--a--b"
    make(repository, "blobs/1234", "snapshots/abc/other/x.jsonl")
    make(tmp_path, "datasets--c--d/blobs/99")
    folder = repository / "snapshots" / "abc" / "data"
    folder.mkdir()
    (folder / "train-0.jsonl").symlink_to("../../../blobs/1234")
    (folder / "train-1.jsonl").symlink_to("../../../../datasets--c--d/blobs/99")
    (folder / "train-2.jsonl").symlink_to("../other/x.jsonl")
    for path in (folder, f"{folder}/train*.jsonl"):
        found = find_files(str(path), ENDINGS)
        assert names(found) == ["train-0.jsonl"] and found.files[0].path == repository / "blobs" / "1234"
        assert found.left_out[0][1:] == (2, ("train-1.jsonl", "train-2.jsonl"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.jsonl", r"caf\xe9.jsonl"),
        ("café 🌧.jsonl".encode(), "café 🌧.jsonl"),
        (b"a\nb.jsonl", "a␊b.jsonl"),
        (b"\x1b]0;owned\x07.jsonl", "␛]0;owned␇.jsonl"),
        (b"[bold]x.jsonl", "[bold]x.jsonl"),
    ],
)
def test_any_name_is_found_and_shown_safely(tmp_path: Path, name: bytes, shown: str) -> None:
    (tmp_path / "a [v2]").mkdir()
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a [v2]/" + name))
    path.write_text("x")
    for found in (find_files(f"{tmp_path}/a [v2]", ENDINGS), find_files(f"{tmp_path}/a [v2]/*.jsonl", ENDINGS)):
        assert names(found) == [shown] == [one_line(path.name)]
        assert found.files[0].sha256() and found.files[0].name.encode()
    if b"\xe9.jsonl" not in name:
        assert names(find_files(str(path), ENDINGS)) == [shown]
    else:  # a path in a recipe is text
        with pytest.raises(DataError, match="not UTF-8"):
            find_files(str(path), ENDINGS)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("rows\0.jsonl", "NUL"),
        ("*\0.jsonl", "NUL"),
        ("x" * 300 + ".jsonl", "File name too long"),
        ("*/../../*.jsonl", "a pattern cannot go up"),
        ("a.jsonl/*", "no file matches"),
        ("a.jsonl/b.jsonl", "no such file"),
        ("circle.jsonl", "circle"),
        ("socket.jsonl", "not a regular file"),
    ],
)
def test_paths_that_are_none_are_named(tmp_path: Path, path: str, what: str) -> None:
    make(tmp_path, "a.jsonl", "deep/x")
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    os.mknod(tmp_path / "socket.jsonl", 0o140600)
    with pytest.raises(DataError, match=what) as caught:
        find_files(f"{tmp_path}/{path}", ENDINGS)
    assert caught.value.hint


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such home"):
        find_files("~nobody-of-that-name/rows.jsonl", ENDINGS)


def test_so_many_files_are_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{number}.jsonl" for number in range(5)), "a/b/c/d.md")
    monkeypatch.setattr(module, "MAX_FILES", 4)
    with pytest.raises(DataError, match="more than 4 data files"):
        find_files(str(tmp_path), ENDINGS)
    monkeypatch.setattr(module, "MAX_ENTRIES", 7)
    with pytest.raises(DataError, match="more than 7 files and folders"):
        find_files(str(tmp_path), ENDINGS)


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jsonl", "closed/b.jsonl")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_files(str(tmp_path), ENDINGS)
    assert names(found) == ["a.jsonl"]
    assert found.left_out_text() == "1 folders that cannot be read left out: closed"


def test_a_folder_that_goes_away_while_it_is_walked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jsonl", "short/b.jsonl")
    scandir = os.scandir

    def remove(path: Path) -> object:
        entries = scandir(path)
        if Path(path) == tmp_path and (tmp_path / "short").exists():
            monkeypatch.setattr(Path, "stat", gone)
        return entries

    stat = Path.stat

    def gone(self: Path, **keys: bool) -> os.stat_result:
        if self.name == "short":
            raise FileNotFoundError(2, "No such file or directory")
        return stat(self, **keys)

    monkeypatch.setattr(os, "scandir", remove)
    found = find_files(str(tmp_path), ENDINGS)
    assert names(found) == ["a.jsonl"] and "short" in found.left_out_text()


# --- opening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["grown", "shorter", "written over", "another file", "a link", "a pipe", "gone"])
def test_a_file_that_changed_since_it_was_found_is_refused(tmp_path: Path, change: str) -> None:
    make(tmp_path, "a.jsonl", "secret.txt")
    path = tmp_path / "a.jsonl"
    os.utime(path, (1, 1))
    (file,) = find_files(str(path), ENDINGS).files
    if change == "grown":
        path.open("a").write("more")
    elif change == "shorter":
        os.truncate(path, 2)
    elif change == "written over":
        path.write_text("A.JSONL")
    else:
        path.unlink()
        if change == "another file":
            path.write_text("a.jsonl")
        elif change == "a link":
            path.symlink_to("secret.txt")
        elif change == "a pipe":
            os.mkfifo(path)
    with pytest.raises(DataError, match=r"changed while it was read|is a link|not a regular file|cannot be read"):
        file.open()


def test_a_file_that_grows_while_it_is_read_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x\n" * 2_000_000)
    (file,) = find_files(str(path), ENDINGS).files
    lines = 0
    with path.open("ab") as writer, file.open() as reader, pytest.raises(DataError, match="changed while it was read"):
        while reader.readline() and lines < 3_000_000:
            lines += 1
            if lines % 100_000 == 0:
                writer.write(b"x\n" * 200_000)
                writer.flush()
    assert lines == 2_000_000


def test_a_path_like_a_name_of_the_hub_is_answered_with_it(tmp_path: Path) -> None:
    for path, said in (("tatsu-lab/alpaca", True), ("tatsu-lab/alpaca.json", False), ("alpaca", False)):
        with pytest.raises(DataError) as caught:
            find_files(str(tmp_path / path), (".jsonl",))
        assert ('path = "hub:tatsu-lab/alpaca"' in caught.value.hint) == said


def test_links_of_ones_own_are_told_how_they_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").symlink_to("../real/rows.jsonl")
    for path in ("rows", "rows/*.jsonl"):
        with pytest.raises(DataError, match=r"1 links that end outside .* left out: rows.jsonl") as error:
            find_files(str(tmp_path / path), [".jsonl"])
        assert error.value.hint.startswith("a link is followed where a path names it")
    assert len(find_files(str(tmp_path / "rows" / "rows.jsonl"), [".jsonl"]).files) == 1
