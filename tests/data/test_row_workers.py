"""Rows made by several processes are those made by none: the same bytes, notices and errors; and no process stays."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora.data import raw_batches, row_worker, row_workers
from qlora.data.chat import ChatTokenizer
from qlora.data.limits import TextLimits
from qlora.data.made_rows import RowMaker
from qlora.data.prepare import PreparedData, prepare
from qlora.data.row_workers import RowWorkers, how_many
from qlora.data.sources import source_files
from qlora.errors import DataError, QloraError, TokenizerError
from qlora.events import Progress, Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import lines
from tests.families import make_tokenizer

STARTED: list[int] = []  # processes that were started since the last look
# It shows no tools, which is said.
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What it writes of a row that says "hang" is more than it may: its process is ended for it.
HANGING = "{% if 'hang' in messages[0].content %}{{ 'x' * 9000000000 }}{% endif %}"


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, workers for the smallest files, and each process that is started noted."""
    STARTED.clear()
    monkeypatch.setattr(raw_batches, "BATCH_ROWS", 8)
    monkeypatch.setattr(row_workers, "MIN_BYTES", 0)
    popen = subprocess.Popen

    def noted(*args: Any, **keys: Any) -> Any:
        process = popen(*args, **keys)
        STARTED.extend([process.pid] if row_worker.__file__ in args[0] else [])
        return process

    monkeypatch.setattr(row_workers.subprocess, "Popen", noted)


@cache
def tokenizer(template: str = "") -> Any:
    made = make_tokenizer()
    made.chat_template = template + PLAIN
    return made


def rows(count: int) -> list[Any]:
    """Chats, with tools, odd keys, text of other scripts, too long ones and some without an answer."""
    draw = random.Random(count)
    found: list[Any] = []
    for number in range(count):
        talk = []
        for turn in range(draw.choice((1, 1, 2, 3))):
            words = " ".join(
                draw.choice(("never", "größer", "🌧", "日本", "x" * 40, "and")) for _ in range(draw.randint(1, 30))
            )
            talk += [
                {"role": "user", "content": f"{number} {words}?"},
                {"role": "assistant", "content": f"{turn} {words}"},
            ]
        row: dict[str, Any] = {"messages": talk}
        if number % 5 == 0:
            row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        if number % 7 == 0:
            row[f"odd{number % 40}"] = number
        if number % 11 == 3:
            row = {"messages": talk[:1]}
        found.append(row)
    return found


def sources(folder: Path) -> tuple[SourceSection, ...]:
    """A chat file that begins with a broken row, a CSV whose columns have other names, and a book."""
    made = [json.dumps(row, ensure_ascii=False) for row in rows(90)]
    made.insert(0, "{broken")
    made.insert(40, '{"messages": 3}')
    (folder / "chat.jsonl").write_text("\n".join(made), encoding="utf-8")
    (folder / "table.csv").write_text(
        "frage,output,id\n" + "".join(f"Was ist {n}?,Es ist {n}.,{n}\n" for n in range(30))
    )
    (folder / "book.txt").write_text("\n\n".join(f"Paragraph {n} of a book." * 3 for n in range(40)))
    return (
        SourceSection(path=str(folder / "chat.jsonl")),
        SourceSection(path=str(folder / "table.csv"), format="alpaca", columns={"instruction": "frage"}),
        SourceSection(path=str(folder / "book.txt")),
    )


def run(
    monkeypatch: pytest.MonkeyPatch, data: DataSection, cache_dir: Path, workers: int, template: str = ""
) -> tuple[PreparedData | QloraError, list[Any]]:
    """What comes out, or the error; and all events but those of progress."""
    monkeypatch.setattr(row_workers, "how_many", lambda *_: (workers, 1))
    sink = Recorder()
    chat = ChatTokenizer(tokenizer(template), "assistant", sink)
    try:
        made: PreparedData | QloraError = prepare(data, "tokenizer", chat, 1, cache_dir, sink)
    except QloraError as error:
        made = error
    return made, [event for event in sink.events if not isinstance(event, Progress)]


def gone(processes: list[int]) -> bool:
    """Whether all of them have ended, soon."""
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def cached_bytes(cache_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache_dir.rglob("*")) if path.suffix in (".arrow", ".json")}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_bytes_and_notices_whatever_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    data = DataSection(train=sources(tmp_path), max_length=64, max_bad_rows=50)
    alone, said_alone = run(monkeypatch, data, tmp_path / "alone", 0)
    assert not STARTED
    made, said = run(monkeypatch, data, tmp_path / "several", workers)
    assert len(STARTED) == workers and gone(STARTED)
    assert isinstance(made, PreparedData) and isinstance(alone, PreparedData)
    assert made.fingerprint == alone.fingerprint and len(made.train.lengths) > 60
    assert said == said_alone and {"rows", "tools", "columns", "text", "format"} <= {
        getattr(e, "topic", "") for e in said
    }
    ours, theirs = cached_bytes(tmp_path / "several"), cached_bytes(tmp_path / "alone")
    assert ours["rows.arrow"] == theirs["rows.arrow"] and ours["report.json"] == theirs["report.json"]


def test_the_same_error_at_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bad row that is one too many, by its number in the file, not by which process met one first."""
    data = DataSection(train=sources(tmp_path), max_length=64, max_bad_rows=4)
    errors = [run(monkeypatch, data, tmp_path / f"{workers}", workers)[0] for workers in (0, 2)]
    assert all(isinstance(error, DataError) for error in errors)
    assert errors[0].args == errors[1].args and "chat.jsonl:" in str(errors[0])
    assert getattr(errors[0], "hint", "") == getattr(errors[1], "hint", "")


def test_a_template_that_has_to_be_stopped_is_given_up_after_as_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    hangs = [{"role": "user", "content": "hang"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "a.jsonl").write_text(lines([{"messages": hangs if n in (3, 30, 60) else talk} for n in range(70)]))
    data = DataSection(train=(SourceSection(path=str(tmp_path / "a.jsonl")),), max_bad_rows=10)
    errors = [run(monkeypatch, data, tmp_path / f"{workers}", workers, HANGING)[0] for workers in (0, 3)]
    assert isinstance(errors[0], TokenizerError) and "stopped 3 times" in errors[0].what
    assert errors[0].args == errors[1].args


def run_disturbed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, signal_number: int, times: int
) -> PreparedData | QloraError:
    """A run with two processes; `times` of them are sent a signal while they work, one after the other."""
    words = random.Random(0)  # none of which comes twice: a batch takes longer than it takes to send a signal
    long = [" ".join(f"{words.getrandbits(64):x}" for _ in range(120)) for _ in range(200)]
    asked = [
        [{"role": "user", "content": text}, *row["messages"][1:]] for text, row in zip(long, rows(200), strict=True)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in asked))
    data = DataSection(
        train=(SourceSection(path=str(folder / "a.jsonl"), format="messages"),), max_length=4096, max_bad_rows=50
    )
    take, sent = RowWorkers._take, list[int]()

    def disturbed(self: RowWorkers, awaited: Any) -> None:
        if awaited.ready and len(sent) < times and awaited._process.pid not in sent:
            sent.append(awaited._process.pid)
            os.kill(awaited._process.pid, signal_number)
        stopped = signal_number == signal.SIGSTOP and awaited._process.pid in sent  # others may take their time
        monkeypatch.setattr(row_workers, "HANG_SECONDS", 2.0 if stopped else 300.0)
        take(self, awaited)

    monkeypatch.setattr(RowWorkers, "_take", disturbed)
    made, _ = run(monkeypatch, data, folder / "cache", 2)
    assert len(sent) == times and gone(STARTED)
    return made


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_process_that_ends_or_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_number: int
) -> None:
    made = run_disturbed(monkeypatch, tmp_path, signal_number, times=1)
    assert isinstance(made, PreparedData) and len(STARTED) == 3
    monkeypatch.undo()
    assert len(made.train.lengths) + len(made.eval.lengths) == sum(len(row["messages"]) > 1 for row in rows(200))


def test_rows_that_end_two_processes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_disturbed(monkeypatch, tmp_path, signal.SIGKILL, times=2)
    assert isinstance(made, TokenizerError)
    assert "a.jsonl:1 to " in made.what and "ended with SIGKILL, twice" in made.what and "halve the data" in made.hint


def test_rows_are_made_here_where_no_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSection(train=sources(tmp_path), max_length=64, max_bad_rows=50)
    alone, said_alone = run(monkeypatch, data, tmp_path / "alone", 0)
    monkeypatch.setattr(row_worker, "__file__", str(tmp_path / "nowhere.py"))
    made, said = run(monkeypatch, data, tmp_path / "several", 2)
    assert isinstance(made, PreparedData) and isinstance(alone, PreparedData) and len(STARTED) >= 2
    assert made.fingerprint == alone.fingerprint and said == said_alone


def test_an_interrupted_run_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    class Interrupted(Recorder):
        def emit(self, event: Any) -> None:
            if isinstance(event, Progress):
                children.extend(child.pid for pid in STARTED for child in psutil.Process(pid).children())
                raise KeyboardInterrupt

    monkeypatch.setattr(row_workers, "how_many", lambda *_: (2, 1))
    data = DataSection(train=sources(tmp_path), max_length=64, max_bad_rows=50)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, "tokenizer", ChatTokenizer(tokenizer(), "assistant", Recorder()), 1, tmp_path, Interrupted())
    assert len(STARTED) == 2 and children and gone(STARTED + children)


def test_no_more_is_read_ahead_than_processes_have_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes is never in memory, however slow the processes are."""
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"row {number}"} for number in range(400)]))
    source = SourceSection(path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(row_workers, "how_many", lambda *_: (2, 1))
    read = 0

    def counted() -> Any:
        nonlocal read
        for batch in raw_batches.raw_batches(0, source, source_files(source).files, {}):
            read += 1
            yield batch

    maker = RowMaker(ChatTokenizer(tokenizer(), "assistant", Recorder()), TextLimits(), 64)
    with RowWorkers(maker, 1) as workers:
        for made, (batch, of_it) in enumerate(workers.made(counted()), 1):
            assert read - made <= 2 * row_workers.AHEAD <= 4 and len(of_it.rows) == len(batch.rows)
    assert read == made > 40


def test_nothing_is_started_by_multiprocessing() -> None:
    """Its processes run the user's script or notebook once more."""
    package = Path(row_workers.__file__).parent.parent
    banned = re.compile(r"^\s*import multiprocessing|\bfrom multiprocessing\b|ProcessPool", re.MULTILINE)
    assert not [path for path in package.rglob("*.py") if banned.search(path.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_a_plain_script_is_run_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"row {number}"} for number in range(40)]))
    script = tmp_path / "plain.py"
    script.write_text(f"""
print("begun", flush=True)
from pathlib import Path
from qlora.data import row_workers
from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import prepare
from qlora.events import Sinks
from qlora.recipe.sections import DataSection, SourceSection
from tests.families import make_tokenizer
row_workers.MIN_BYTES, row_workers.how_many = 0, lambda *_: (2, 1)
data = DataSection(train=(SourceSection(path={str(tmp_path / "a.jsonl")!r}),))
tokenizer = make_tokenizer()
tokenizer.chat_template = {PLAIN!r}
made = prepare(data, "-", ChatTokenizer(tokenizer, "assistant", Sinks()), 0, Path({str(tmp_path)!r}), Sinks())
print(len(made.train.lengths) + len(made.eval.lengths))
""")
    home = Path(row_workers.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.split() == ["begun", "40"], done.stderr


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """However that one goes: SIGKILL cannot be seen, and leaves nobody who could end it."""
    script = """
import json, subprocess, sys
from qlora import child_process
from qlora.data import row_worker
command = [sys.executable, "-I", row_worker.__file__, json.dumps(child_process.import_path())]
process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(process.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    assert gone([worker])


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are cores and memory for; none for a small set, for one core, and where memory is short."""
    monkeypatch.setattr(row_workers, "MIN_BYTES", 4 << 20)
    monkeypatch.setattr(row_workers, "available_ram", lambda: 16 << 30)
    monkeypatch.setattr(row_workers, "usable_cores", lambda: 6)
    assert how_many(100 << 20, 1 << 20) == (6, 1)
    assert how_many(1 << 20, 1 << 20) == (0, 0)
    monkeypatch.setattr(row_workers, "usable_cores", lambda: 100)
    assert how_many(100 << 20, 1 << 20) == (19, 5)  # a quarter of the memory
    monkeypatch.setattr(row_workers, "available_ram", lambda: 1 << 30)
    assert how_many(100 << 20, 1 << 20) == (0, 0)
    monkeypatch.setattr(row_workers, "available_ram", lambda: 64 << 30)
    monkeypatch.setattr(row_workers, "usable_cores", lambda: 1)
    assert how_many(100 << 20, 1 << 20) == (0, 0)
