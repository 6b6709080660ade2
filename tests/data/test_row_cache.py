"""A cache that others can reach is not believed, and what was left in it by anybody is found or made anew."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qlora import disk, files
from qlora.data import row_cache as module
from qlora.data.chat import TokenRow
from qlora.data.formats import Conversation
from qlora.data.row_cache import REPORT_FILE, ROWS_FILE, RowCache, RowReport
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.token_cache import MadeRow, RowWriter
from qlora.events import Recorder

KEY, OTHER_KEY = "1" * 64, "2" * 64
SOMEBODY = 4321  # another user's number


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run's own folders are made, to be seen empty afterwards."""
    (tmp_path / "private").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    return tmp_path / "private"


def fill(folder: Path, tokens: tuple[int, ...] = (1, 2, 3), **report: Any) -> None:
    with RowWriter(folder / ROWS_FILE) as writer:
        row = TokenRow(list(tokens), [0.0] + [1.0] * (len(tokens) - 1))
        writer.write([(MadeRow.of(row, Conversation(text="x")), "a.jsonl:1", 0)])
        content = writer.content_sha256()
    RowReport(content_sha256=content, rows=1, **report).write(folder)


def ask(root: Path, key: str = KEY, highest_id: int = 9) -> tuple[list[int], list[str]]:
    """The tokens of the one row, and what was said. Made anew they are 1, 2, 3."""
    sink = Recorder()
    cached = RowCache(root, highest_id, sink).rows(key, fill)
    assert cached.report.rows == 1
    return cached.stored.split().rows[0].input_ids, [event.as_dict()["message"] for event in sink.of("notice")]


def plant(root: Path, key: str = KEY, tokens: tuple[int, ...] = (6, 6, 6)) -> Path:
    """An entry whose tokens are others than those that would be made, signed by a manifest as it should be."""
    folder = root / "tokens" / key[:32]
    root.mkdir(exist_ok=True)
    disk.publish_folder(folder, lambda place: fill(place, tokens), {"key": key})
    return folder


def test_what_is_ours_is_read_and_what_is_made_is_kept(tmp_path: Path) -> None:
    assert ask(tmp_path / "cache") == ([1, 2, 3], [])
    plant(tmp_path / "cache")  # by ourselves: nothing tells these from our own
    assert ask(tmp_path / "cache") == ([6, 6, 6], [])
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700 or os.name == "nt"


def test_the_root_may_be_a_link_and_what_lies_below_it_may_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")
    assert ask(tmp_path / "cache") == ([1, 2, 3], [])
    plant(tmp_path / "theirs")
    entry = tmp_path / "real" / "tokens" / KEY[:32]
    entry.rename(tmp_path / "aside")
    entry.symlink_to(tmp_path / "theirs" / "tokens" / KEY[:32])
    tokens, said = ask(tmp_path / "cache")
    assert tokens == [1, 2, 3] and said == [f"{entry} is a link: rows are tokenized anew, for this run alone"]


def owned_by_another(path: Path) -> None:
    os.chown(path, SOMEBODY, SOMEBODY)


def open_to_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, SOMEBODY)
    path.chmod(path.stat().st_mode | 0o020)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", ["", "tokens", f"tokens/{KEY[:32]}", f"tokens/{KEY[:32]}/{ROWS_FILE}"])
@pytest.mark.parametrize("how", [owned_by_another, open_to_all, open_to_a_group])
def test_tokens_that_others_could_have_written_are_not_trained(
    tmp_path: Path, private: Path, how: Callable[[Path], None], part: str
) -> None:
    plant(tmp_path / "cache")
    place = tmp_path / "cache" / part
    how(place)
    before = sorted(tmp_path.glob("cache/**/*"))
    tokens, (said,) = ask(tmp_path / "cache")
    assert tokens == [1, 2, 3]
    assert said.startswith(f"{place} ") and "rows are tokenized anew, for this run alone" in said
    assert ("belongs to another user (number 4321)" in said) == (how is owned_by_another)
    assert ("can be written by others" in said) == (how is not owned_by_another)
    assert sorted(tmp_path.glob("cache/**/*")) == before and not list(private.iterdir())


def test_a_group_of_the_user_alone_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian and Fedora give each user one, and a umask that lets it write."""
    plant(tmp_path / "cache")
    (tmp_path / "cache" / "tokens").chmod(0o775)
    monkeypatch.setattr(files, "_is_private", lambda group: True)
    assert ask(tmp_path / "cache")[0] == [6, 6, 6]
    monkeypatch.setattr(files, "_is_private", lambda group: False)
    assert ask(tmp_path / "cache")[0] == [1, 2, 3]
    assert files.distrust(tmp_path / "nothing", tmp_path / "nothing" / "below") is None


def test_an_entry_of_other_rows_is_not_read_under_this_name(tmp_path: Path) -> None:
    plant(tmp_path / "cache", OTHER_KEY).rename(tmp_path / "cache" / "tokens" / KEY[:32])
    tokens, (said,) = ask(tmp_path / "cache")
    assert tokens == [1, 2, 3] and "are not read (they are those of other rows): tokenizing anew" in said
    assert ask(tmp_path / "cache") == ([1, 2, 3], [])


def other_columns(folder: Path) -> None:
    with pa.ipc.new_stream(str(folder / ROWS_FILE), pa.schema({"input_ids": pa.string()})) as stream:
        stream.write_batch(pa.record_batch({"input_ids": ["x"]}))


def columns(folder: Path, **changed: Any) -> None:
    """The file as a RowWriter writes it, with other values in some columns."""
    with pa.memory_map(str(folder / ROWS_FILE)) as source:
        table = pa.ipc.open_stream(source).read_all()
        values = {name: changed.get(name, table[name].to_pylist()) for name in table.column_names}
        schema = table.schema
    (folder / ROWS_FILE).unlink()
    with pa.ipc.new_stream(str(folder / ROWS_FILE), schema) as stream:
        stream.write_table(pa.table(values, schema=schema))


def report(folder: Path, **changed: Any) -> None:
    values = json.loads((folder / REPORT_FILE).read_text())
    (folder / REPORT_FILE).write_text(json.dumps(values | changed))


def bad_offsets(folder: Path) -> None:
    data = (folder / ROWS_FILE).read_bytes()
    at = data.index((3).to_bytes(4, "little") + bytes(4))
    (folder / ROWS_FILE).write_bytes(data[:at] + (1 << 30).to_bytes(4, "little") + data[at + 4 :])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "rows cut": lambda folder: os.truncate(folder / ROWS_FILE, 700),
    "rows of nothing": lambda folder: (folder / ROWS_FILE).write_bytes(b""),
    "rows of junk": lambda folder: (folder / ROWS_FILE).write_bytes(os.urandom(2000)),
    "other columns": other_columns,
    "offsets beyond the file": bad_offsets,
    "a token that is none": lambda folder: columns(folder, input_ids=[[1, 2, 10]]),
    "a token below zero": lambda folder: columns(folder, input_ids=[[1, -2, 3]]),
    "a token of nothing": lambda folder: columns(folder, input_ids=[[1, None, 3]]),
    "another length": lambda folder: columns(folder, length=[4]),
    "a negative length": lambda folder: columns(folder, length=[-3]),
    "other weights": lambda folder: columns(folder, loss_weights=[[1.0]]),
    "no tokens": lambda folder: columns(folder, input_ids=[[]], loss_weights=[[]], length=[0]),
    "a source below zero": lambda folder: columns(folder, source=[-1]),
    "nothing for a row": lambda folder: columns(folder, where=[None]),
    "a report of junk": lambda folder: (folder / REPORT_FILE).write_bytes(b"\x80{"),
    "a report that is a list": lambda folder: (folder / REPORT_FILE).write_text("[]"),
    "a report of deep lists": lambda folder: (folder / REPORT_FILE).write_text("[" * 5000 + "]" * 5000),
    "a report with text for a number": lambda folder: report(folder, rows="1"),
    "a report with a number for text": lambda folder: report(folder, content_sha256=1),
    "a report of another kind of rejection": lambda folder: report(folder, rejected=[{"source": 1}]),
    "a report with a huge number": lambda folder: report(folder, tokens=10**4000),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_signed_entry_that_is_not_what_we_write_is_made_anew(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cache" / "tokens" / KEY[:32]

    def write(place: Path) -> None:
        fill(place, (6, 6, 6))
        DAMAGES[name](place)

    folder.parent.mkdir(parents=True)
    disk.publish_folder(folder, write, {"key": KEY})
    assert disk.verify_folder(folder) is None  # whoever planted it can sign it too
    tokens, (said,) = ask(tmp_path / "cache")
    assert tokens == [1, 2, 3] and "tokenizing anew" in said and "\n" not in said
    assert ask(tmp_path / "cache") == ([1, 2, 3], [])


@pytest.mark.parametrize("name", [ROWS_FILE, REPORT_FILE, disk.MANIFEST])
def test_a_pipe_in_an_entry_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = plant(tmp_path / "cache")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    tokens, (said,) = ask(tmp_path / "cache")
    assert tokens == [1, 2, 3] and f"{folder / name} is neither a file nor a folder" in said


def test_reasons_are_counted_and_do_not_grow_without_end(tmp_path: Path) -> None:
    report = RowReport()
    for number in range(10_000):
        report.reject("a.jsonl", RowError(f"role is 'robot {number}'").reason, f"a.jsonl:{number}")
    report.leave_out("a.jsonl", RowTooLong("over 8 MiB in one line"), "a.jsonl:7")
    assert len(report.rejected) == module.MAX_REASONS + 1 and report.unread == 1
    assert sum(entry.count for entry in report.rejected.values()) == 10_001
    report.write(tmp_path)
    stored = RowReport.read(tmp_path)
    assert stored.rejected == report.rejected and stored.unread == 0
