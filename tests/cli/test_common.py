"""Every error of the tree: its exit code and its two lines, whatever the message holds."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import errors
from qlora.cli import common
from qlora.errors import Problem, QloraError, RecipeError, StoppedBySignal

MAKERS: dict[type[QloraError], Callable[[], QloraError]] = {
    RecipeError: lambda: RecipeError([Problem("recipe.toml:3", "lora.rank is unknown", "did you mean lora.r?")]),
    StoppedBySignal: lambda: StoppedBySignal("stopped by SIGTERM", "continue with --resume", signal.SIGTERM),
}
CODES = {
    QloraError: 2,
    errors.UserError: 2,
    errors.RecipeError: 2,
    errors.DataError: 2,
    errors.ModelError: 2,
    errors.TokenizerError: 2,
    errors.RunFolderError: 2,
    errors.HardwareError: 2,
    errors.ExportError: 2,
    errors.TargetTaken: 2,
    errors.RewardError: 2,
    errors.DoesNotFit: 3,
    errors.TrainingStopped: 4,
    errors.StoppedBySignal: 143,
}


def tree(root: type[QloraError]) -> list[type[QloraError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in tree(child))]


def ended(work: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as end:
        common.run(work)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_table_has_every_error_of_the_tree() -> None:
    assert {kind for kind in tree(QloraError) if kind.__module__.startswith("qlora.")} == set(CODES)
    for kind in CODES:
        assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_two_lines_and_an_exit_code(kind: type[QloraError], capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise MAKERS.get(kind, lambda: kind("rows.jsonl:3: what is wrong [x]", "what to do about it"))()

    assert ended(work) == CODES[kind]
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first.startswith("error: ") and second.startswith("       ") and len(second.strip()) > 5
    assert not said.out and "Traceback" not in said.err


def test_several_problems_of_a_recipe_are_two_lines_each(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RecipeError([Problem("a.toml:1", "one", "do one"), Problem("a.toml:2", "two", "do two")])

    assert ended(work) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [
        (errno.ENOSPC, 4, "free some space"),
        (errno.EDQUOT, 4, "quota"),
        (errno.EFBIG, 4, "free some space"),
        (errno.EACCES, 2, "right to read and write"),
        (errno.EROFS, 2, "right to read and write"),
        (errno.EMFILE, 2, "ulimit -n"),
        (errno.EIO, 2, "the device"),
    ],
)
def test_what_the_system_refuses(number: int, code: int, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OSError(number, "the system's words", "/some/place")

    assert ended(work) == code
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: /some/place: the system's words" and hint in second


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    assert ended(work) == 130
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_fault_of_ours_is_two_lines_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora.cli import common

    def work() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(SystemExit) as caught:
        common.run(work)
    assert caught.value.code == common.INTERNAL_ERROR
    error = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: oops" in error and "Traceback" not in error
    assert "ZeroDivisionError" in Path(error.split("with ")[-1].strip()).read_text()


class PanicException(BaseException):
    """As pyo3 raises it: no Exception."""


@pytest.mark.parametrize(
    "error",
    [PanicException("a panic"), SystemExit(0), SystemExit("bye"), GeneratorExit(), RecursionError("too deep")],
    ids=repr,
)
def test_what_a_library_raises_is_two_lines_too(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert ended(work) == common.INTERNAL_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"internal error: {type(error).__name__}" in lines[0]


def test_no_memory_left_is_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise MemoryError

    assert ended(work) == 3
    assert "no memory left" in capsys.readouterr().err.splitlines()[0]


def test_memory_that_ran_out_in_another_words_is_exit_3_too(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    assert ended(work) == 3
    assert "internal error" not in capsys.readouterr().err


def test_a_gpu_that_failed_is_no_fault_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    assert ended(work) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].endswith("the GPU failed: an illegal memory access was encountered")


def test_a_message_of_any_length_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ValueError("x" * 10_000_000)

    assert ended(work) == common.INTERNAL_ERROR
    assert len(capsys.readouterr().err) < 3_000


def test_a_traceback_that_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted link where it would be written, no home, and a file in the way."""
    victim = tmp_path / "thesis"
    victim.write_text("mine")
    (tmp_path / "crashes").mkdir()
    (tmp_path / "crashes" / f"crash-{os.getpid()}.txt").symlink_to(victim)

    def work() -> None:
        raise ZeroDivisionError

    for cache in (str(tmp_path), "~no-such-user/x", str(victim)):
        monkeypatch.setenv("QLORA_CACHE", cache)
        assert ended(work) == common.INTERNAL_ERROR
        assert "the command and its recipe (the traceback could not be kept" in capsys.readouterr().err
    assert victim.read_text() == "mine"


def test_an_answer_in_json_has_neither_secrets_nor_raw_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-this-test")
    common.answer({"folder": "/x/a-token-of-this-test/\x1b[2J\udcff", "list": ["\x7f"], "n": 1.5})
    said = capsys.readouterr().out
    assert said.isascii() and all(letter.isprintable() or letter == "\n" for letter in said)
    assert json.loads(said) == {"folder": "/x/[hidden]/␛[2J\\xff", "list": ["␡"], "n": 1.5}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("start anew with mode='fresh'", "start anew with --fresh"),
        ("add to='gguf', quants=['q4_k_m'], say", "add --to gguf --quant q4_k_m, say"),
        ("use vram='12GiB', or one of", "use --vram 12GiB, or one of"),
        ("`overrides` lora.rank=8", "--set lora.rank=8"),
        ("another `merge_base`, or merge_base='nf4'", "another --base, or --base nf4"),
    ],
)
def test_messages_show_the_options_of_the_commands(message: str, shown: str) -> None:
    assert common.as_options(message) == shown


def test_help_that_nobody_reads_is_the_signal_of_a_broken_pipe() -> None:
    """typer makes exit code 1 of it, which is that of a fault of ours."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "qlora.cli.estimate", "--help"], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
