"""A disk that is full: a failed save is said and tried again, three end the run with exit 4, old checkpoints stand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from qlora import disk
from qlora.errors import RunFolderError, StoppedBySignal, TrainingStopped
from qlora.report.files import JsonLines, read_events
from qlora.stop import StopRequest
from qlora.training import checkpoint
from tests.faults.cases import EVERY, SETTINGS, last_hashes
from tests.faults.forks import fork, warm
from tests.runs import hashes, run_dir, train, values, write_recipe

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
SHORT = (*SETTINGS, "train.optimizer=adamw", "checkpoint.every_steps=1", "data.eval_fraction=0")


def fail_writes(monkeypatch: pytest.MonkeyPatch, bad_saves: set[int]) -> list[int]:
    """Let the writing of some checkpoints (counted from 1) fail as safetensors does on a full disk."""
    real = checkpoint.save_file
    saves: list[int] = []

    def save_file(tensors: Any, path: Path) -> None:
        if path.name == "adapter.safetensors":
            saves.append(len(saves) + 1)
        if saves[-1] in bad_saves and path.name == "optimizer.safetensors":
            path.write_bytes(b"half of it")
            raise safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return saves


def test_a_failed_save_is_an_event_and_the_next_one_is_tried(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    fail_writes(monkeypatch, {2, 3})
    recorder = train(recipe, *SHORT, "train.max_steps=5")
    said = values(recorder, "recovered", "message")
    assert [message.partition(":")[0] for message in said] == [
        "the state of step 2 could not be saved",
        "the state of step 3 could not be saved",
    ]
    assert "No space left on device" in said[0] and "attempt 1 of 3" in said[0] and "attempt 2 of 3" in said[1]
    folders = sorted(path.name for path in (run_dir(recipe) / "checkpoints").iterdir())
    assert folders == ["step-000004", "step-000005"]
    assert values(recorder, "step", "step") == [1, 2, 3, 4, 5]


def test_three_in_a_row_end_the_run_and_the_last_good_one_stands(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = write_recipe(tmp_path / "straight", llama)
    train(straight, *SHORT, "train.max_steps=8")
    recipe = write_recipe(tmp_path / "full", llama)
    with monkeypatch.context() as patch:
        fail_writes(patch, {3, 4, 5})
        with pytest.raises(TrainingStopped, match=r"step 5 could not be saved .*; step 2 is the last saved") as stopped:
            train(recipe, *SHORT, "train.max_steps=8")
    assert stopped.value.exit_code == 4 and "mode='resume'" in stopped.value.hint
    folders = sorted((run_dir(recipe) / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000001", "step-000002"]  # no half one, no lost one
    assert all(disk.verify_folder(folder) is None for folder in folders)
    train(recipe, *SHORT, "train.max_steps=8", mode="resume")
    assert hashes(recipe, 8) == hashes(straight, 8)


def test_at_the_end_there_is_no_next_time(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    fail_writes(monkeypatch, {1})
    with pytest.raises(TrainingStopped, match="nothing is saved yet"):
        train(recipe, *SHORT, "checkpoint.every_steps=100", "train.max_steps=2")


def test_a_stop_that_cannot_be_saved_is_still_a_stop(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    fail_writes(monkeypatch, {1})
    said: list[StoppedBySignal] = []
    real = StopRequest.error

    def error(self: StopRequest, done: str, hint: str) -> StoppedBySignal:
        said.append(real(self, done, hint))
        return said[-1]

    monkeypatch.setattr(StopRequest, "error", error)
    train(recipe, *SHORT, "checkpoint.every_steps=100", "train.max_steps=4", stop_after=2)
    assert "could not be saved" in said[0].what and said[0].exit_code == 130


def test_room_is_looked_at_before_training(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    monkeypatch.setattr(checkpoint.disk, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(RunFolderError, match=r"need \d+ MiB there, 1 MiB are free"):
        train(recipe, *SHORT, "train.max_steps=2")
    assert not list((run_dir(recipe)).glob("checkpoints/*"))


def test_room_is_looked_at_before_each_save(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    real = disk.free_bytes
    answers = iter([real(tmp_path)] * 3)
    monkeypatch.setattr(disk, "free_bytes", lambda path: next(answers, 1000))
    with pytest.raises(TrainingStopped, match=r"0\.0 MiB are free"):
        train(recipe, *SHORT, "train.max_steps=9")
    assert [p.name for p in sorted((run_dir(recipe) / "checkpoints").iterdir())] == ["step-000001", "step-000002"]


def test_an_adapter_that_cannot_be_written_is_not_the_best(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation's adapter does not fit on the disk: the best of those that did is what the run delivers."""
    from qlora.training import best_adapter, evaluate

    real, calls = best_adapter.adapters.save, iter(range(9))
    losses = iter([5.0, 1.0, 3.0, 2.0, 4.0])  # of the untuned base, then of steps 1 to 4

    def save(*arguments: Any) -> None:
        if next(calls) == 0:
            raise NO_SPACE
        real(*arguments)

    monkeypatch.setattr(best_adapter.adapters, "save", save)
    monkeypatch.setattr(evaluate.RunEvaluation, "loss", lambda self, step: next(losses))
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *SHORT, "data.eval_fraction=0.2", "eval.every_steps=1", "train.max_steps=4")
    assert "the adapter of step 1 could not be saved" in values(recorder, "recovered", "message")[0]
    assert values(recorder, "end", "adapter_step") == [3]


def test_events_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half line, no lost line, no end of the run."""
    from qlora.events import Notice

    lines = JsonLines(tmp_path / "events.jsonl")
    real, room = lines._file, [False]

    class Full:
        def write(self, data: bytes) -> int:
            if not room[0]:
                return real.write(data[:7]) or 0  # the disk takes what it can
            return real.write(data) or 0

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    lines.emit(Notice("a", "one"))
    lines._file = Full()  # type: ignore[assignment]
    lines.emit(Notice("a", "two"))
    assert [event["message"] for event in read_events(tmp_path / "events.jsonl")] == ["one"]
    assert (tmp_path / "events.jsonl").read_bytes().endswith(b"}\n")
    room[0] = True
    lines.emit(Notice("a", "three"))
    lines.close()
    assert [event["message"] for event in read_events(tmp_path / "events.jsonl")] == ["one", "two", "three"]


# --- the system says no, for real ------------------------------------------------------------------------------------


@contextmanager
def no_space_at(number: int) -> Iterator[list[str]]:
    """ENOSPC at the n-th call that writes or flushes under a run's folder (0: never). Later calls succeed."""
    import io

    seen: list[str] = []
    fsync, makedir, replacing, renaming = os.fsync, os.mkdir, os.replace, os.rename
    opening = io.open
    save_adapter, save_peft = checkpoint.save_file, safetensors.torch.save_file

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            if len(seen) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        return call

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        writes = any(letter in mode for letter in "wax") and "tiny" in str(file)
        return (counted("open", opening) if writes else opening)(file, mode, *arguments, **named)

    os.fsync, os.mkdir = counted("fsync", fsync), counted("mkdir", makedir)
    os.replace, os.rename = counted("replace", replacing), counted("rename", renaming)
    io.open = open_counted  # type: ignore[assignment]
    checkpoint.save_file = counted("save", save_adapter)
    safetensors.torch.save_file = counted("save", save_peft)
    try:
        yield seen
    finally:
        os.fsync, os.mkdir, os.replace, os.rename = fsync, makedir, replacing, renaming
        io.open = opening  # type: ignore[assignment]
        checkpoint.save_file, safetensors.torch.save_file = save_adapter, save_peft


@pytest.mark.slow
def test_no_space_at_any_write(tmp_path: Path, llama: Path) -> None:
    """One write fails, whichever: the run ends well, or with exit 4 (2 before it has begun) and resumes to the same."""
    from qlora.errors import QloraError
    from tests.faults.forks import finished, in_child

    ready = warm(
        write_recipe(tmp_path, llama),
        *(*SETTINGS, "eval.every_steps=1", "train.max_steps=2", "train.optimizer=adamw"),
    )

    def run(folder: Path, number: int, count: Path | None = None) -> tuple[int, list[str]]:
        def work(say: Callable[[str], None]) -> None:
            try:
                with no_space_at(number) as seen:
                    ready.train(folder, say, every_steps=1, keep=1)
            except QloraError as error:
                say(f"error {error.what}")
                raise SystemExit(error.exit_code) from None
            except OSError as error:
                say(f"oserror {error}")
                raise SystemExit(4 if error.errno == errno.ENOSPC else 70) from None
            if count:
                count.write_text(str(len(seen)))

        child = fork(work)
        return child.wait(), child.rest()

    assert run(tmp_path / "straight", 0, tmp_path / "count")[0] == 0
    wanted = last_hashes(tmp_path / "straight", 2)
    writes = int((tmp_path / "count").read_text())
    assert writes > 40
    codes: list[int] = []
    for number in range(1, writes + 1, EVERY):
        folder = tmp_path / f"at{number}"
        code, said = run(folder, number)
        assert code in (0, 2, 4), (number, code, said[-1])
        codes.append(code)
        for saved in (folder / "tiny" / "checkpoints").glob("step-*"):
            assert disk.verify_folder(saved) is None, (number, saved)
        if code:
            finished(in_child(ready, folder, every_steps=1, keep=1))
        assert last_hashes(folder, 2) == wanted, number
        assert disk.verify_folder(folder / "tiny" / "adapter") is None
    print(
        f"ENOSPC at {len(codes)} of {writes} writes: {codes.count(0)} went on, {codes.count(4)} left with 4, "
        f"{codes.count(2)} with 2; all resumed to the same hashes"
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
def test_a_limit_on_file_sizes(tmp_path: Path, llama: Path) -> None:
    """The kernel's own refusal: from step 3 on no file may have more than 20 kB, as on a disk with a full quota."""
    import resource

    ready = warm(write_recipe(tmp_path, llama), *SHORT, "train.max_steps=8")
    finished_folder, folder = tmp_path / "straight", tmp_path / "full"
    from tests.faults.forks import finished, in_child

    finished(in_child(ready, finished_folder, every_steps=1, keep=2))

    def work(say: Callable[[str], None]) -> None:
        def watch(line: str) -> None:
            say(line)
            if line == "saved checkpoint 2":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        try:
            ready.train(folder, watch, every_steps=1, keep=2)
        except TrainingStopped as error:
            say(f"error {error.what}")
            raise SystemExit(error.exit_code) from None

    child = fork(work)
    assert child.wait() == 4
    said = child.rest()
    assert sum(line.startswith("recovered") for line in said) == 3 and "step 2 is the last saved" in said[-1]
    assert sorted(p.name for p in (folder / "tiny/checkpoints").iterdir()) == ["step-000001", "step-000002"]
    finished(in_child(ready, folder, every_steps=1, keep=2))
    assert last_hashes(folder, 8) == last_hashes(finished_folder, 8)
