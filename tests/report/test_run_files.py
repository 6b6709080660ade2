"""A run's folder as a page needs it, whoever wrote in it and whoever writes in it still."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora import lock
from qlora.errors import RunFolderError
from qlora.report import run_files
from qlora.report.run_files import EventsFile, events_of, flattened, is_under_way, run_of, without_places
from tests.report.cases import FIGURES
from tests.report.runs_told import end, line, start, step, whole, write


def test_a_file_that_grows_is_read_from_where_it_was(tmp_path: Path) -> None:
    run = write(tmp_path, [start(), step(1), step(2)[:40]])
    events = EventsFile(run / "events.jsonl")
    assert events.read() and list(events.log.steps.number) == [1] and events.ends_within_a_line
    with (run / "events.jsonl").open("a") as file:
        file.write(step(2)[40:] + step(3))
    assert events.read() and list(events.log.steps.number) == [1, 2, 3] and not events.ends_within_a_line
    assert not events.read()


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    run = write(tmp_path, [start(), *(step(number) for number in range(1, 9))])
    events = EventsFile(run / "events.jsonl")
    events.read()
    (tmp_path / "new").write_text("".join([start(), *(step(number) for number in range(1, 12))]))
    os.replace(tmp_path / "new", run / "events.jsonl")  # as a resume does; longer than before
    assert events.read() and list(events.log.steps.number) == list(range(1, 12)) and len(events.log.processes) == 1


def test_lines_beyond_all_events_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "MAX_LINE_BYTES", 1_000)
    run = write(tmp_path, [step(1), "x" * 5_500 + "\n", step(2), "y" * 3_000])
    events = events_of(run)
    assert list(events.log.steps.number) == [1, 2] and events.log.foreign == 2


def test_of_a_file_beyond_all_runs_beginning_and_end_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "MAX_READ_BYTES", 8_000)
    monkeypatch.setattr(run_files, "HEAD_BYTES", 2_000)
    run = write(tmp_path, [start(), *(step(number) for number in range(1, 200)), end(400, 199)])
    events = events_of(run)
    numbers = list(events.log.steps.number)
    assert numbers[0] == 1 and numbers[-1] == 199 and 10 < len(numbers) < 60 and events.log.ended is not None
    assert events.skipped_bytes > 30_000 and not events.log.foreign


def test_nothing_but_zeros_is_read_in_pieces(tmp_path: Path) -> None:
    with (tmp_path / "events.jsonl").open("wb") as file:
        file.write((start() + step(1)).encode())
        file.truncate(1 << 27)  # takes no room
    assert list(events_of(tmp_path).log.steps.number) == [1]


@pytest.mark.parametrize("content", [None, "", "my notes\n", line("telepathy"), '{"event": "step"'])
def test_what_holds_no_events_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "events.jsonl").write_text(content)
    with pytest.raises(RunFolderError, match=r"events\.jsonl") as refused:
        events_of(tmp_path)
    assert refused.value.hint
    with pytest.raises(RunFolderError, match="no such folder"):
        events_of(tmp_path / "nothing")


def test_links_are_followed_inside_and_nowhere_else(tmp_path: Path) -> None:
    real, run = write(tmp_path / "real", whole()), tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").symlink_to(real / "events.jsonl")
    with pytest.raises(RunFolderError, match="link out of the folder"):
        events_of(run)
    (run / "events.jsonl").unlink()
    os.mkfifo(run / "events.jsonl")
    with pytest.raises(RunFolderError, match="cannot be read"):
        events_of(run)
    (real / "recipe.toml").symlink_to("/etc/hostname")
    (real / "study").mkdir()
    (real / "study" / "exam.json").symlink_to("/etc/hostname")
    found = run_of(real, "real", events_of(real))
    assert not found.recipe and found.exam is None and len(found.notes) == 2


def test_what_lies_beside_the_events_is_read(tmp_path: Path) -> None:
    run = write(tmp_path, whole(), '[model]\nbase = "/home/alice/b"\n[train]\nseed = 7\n[[data.train]]\npath = "x"\n')
    for name, text in (
        ("study/exam.json", json.dumps(FIGURES)),
        ("export/hf/export.json", '{"fidelity": [{"name": "hf"}]}'),
    ):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(text)
    found = run_of(run, "run", events_of(run))
    assert found.recipe == {"model.base": "…/b", "train.seed": "7", "data.train.0.path": '"x"'} and found.exam
    assert [entry.name for entry in found.fidelity] == ["gguf-q4", "hf"] and not found.notes


@pytest.mark.parametrize("text", ["{", "[]", '{"parts": 3}', "[" * 10_000])
def test_files_beside_the_events_that_are_not_ours_are_said(tmp_path: Path, text: str) -> None:
    run = write(tmp_path, whole(), text)
    for name in ("study/exam.json", "export/hf/export.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(text.replace("parts", "fidelity") if "export" in name else text)
    found = run_of(run, "run", events_of(run))
    assert found.exam is None and len(found.notes) == 3 and str(tmp_path) not in "".join(found.notes)


def test_a_run_under_way_is_seen_by_its_lock(tmp_path: Path) -> None:
    run = write(tmp_path, whole())
    assert not is_under_way(run)
    held = lock.acquire(run / ".lock")
    assert is_under_way(run) and run_of(run, "r", events_of(run)).under_way
    held.release()
    assert not is_under_way(run)
    (run / ".lock").write_text(json.dumps({"pid": 1 << 22, "started": "5", "host": os.uname().nodename}))
    assert not is_under_way(run)  # killed


def test_folders_of_the_owner_are_left_out() -> None:
    assert without_places("kept as /home/alice/runs/a.1 (3 MiB)") == "kept as …/a.1 (3 MiB)"
    assert without_places("C:\\Users\\alice\\x.txt, ~/b/c.txt") == "…/x.txt, …/c.txt"
    assert (
        without_places("1/2 and https://example.org/a/b at 3 tokens/s")
        == "1/2 and https://example.org/a/b at 3 tokens/s"
    )
    assert flattened({"a": {"b": [1, 2], "c": {}}}) == {"a.b": "[1, 2]", "a.c": "{}"}


def test_of_a_file_little_over_the_limit_nothing_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path, [start(), *(line("notice", topic="a", message="b", count=1) for _ in range(100))])
    size = (run / "events.jsonl").stat().st_size
    monkeypatch.setattr(run_files, "MAX_READ_BYTES", size - 500)
    monkeypatch.setattr(run_files, "HEAD_BYTES", 2_000)
    events = events_of(run)
    assert events.skipped_bytes == 0 and events.log.told["a", "b"].times == 100 and not events.log.foreign
