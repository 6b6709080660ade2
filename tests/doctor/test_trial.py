"""Stages in processes of their own: what raises, hangs, dies or lies is one stage's failure, and the others go on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora.doctor import trial
from qlora.doctor.stages import STAGES, Stage
from qlora.doctor.trial import Trial, attempt
from tests.doctor.cases import CHILD, package

PANIC = """
class PanicException(BaseException):
    pass
PanicException.__module__ = "pyo3_runtime"
raise PanicException
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="ends by signals")


def tried(*names: str, seconds: float = 20, needs: bool = False) -> dict[str, Trial]:
    stages = {name: Stage(STAGES[name].needs if needs else (), seconds, dict) for name in names}
    return {one.stage: one for one in attempt(CHILD, stages)}


@posix
@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "ImportError: libcudart.so.13"),
        ("raise OSError('[WinError 126] shm.dll')", "OSError: [WinError 126]"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import os; print('stage: no answer', flush=True); os.write(2, b'out of luck'); os._exit(3)", "out of luck"),
        ("raise SystemError", "SystemError"),
        (
            PANIC,
            "Panic",
        ),
    ],
)
def test_whatever_a_library_does_is_its_own_failure(
    code: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "peft", code)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = tried("peft", "llama.cpp")
    assert found["peft"].answer is None and failure in found["peft"].failure
    assert found["llama.cpp"].answer is not None, found["llama.cpp"]


@posix
def test_one_that_hangs_is_ended_and_what_needs_it_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "torch", "import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trial, "STARTING_SECONDS", 0.3)
    began: list[str] = []
    stages = {name: Stage(STAGES[name].needs, 0.1, dict) for name in ("torch", "device", "nf4")}
    found = {one.stage: one for one in attempt(CHILD, stages, began.append)}
    assert "did not end" in found["torch"].failure and began == ["torch"]
    assert found["device"].needs == "torch" and found["nf4"].needs == "torch"


def test_python_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.child_process, "command", lambda *_: ["/no/such/python"])
    found = tried("peft", "datasets")
    assert all("could not be started" in one.failure for one in found.values()) and len(found) == 2


@posix
@pytest.mark.parametrize("line", ["", "[]", '{"stage": "peft"', '{"stage": "other", "answer": {}}', "x" * 70_000])
def test_what_is_no_answer_is_none(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.child_process, "command", lambda *_: ["/bin/echo", line])
    assert tried("peft")["peft"].failure == "what it answered cannot be read"


@posix
def test_an_answer_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"stage": "peft", "failure": "\\u001b[2Jgone", "mend": "x", "answer": 7}'
    monkeypatch.setattr(trial.child_process, "command", lambda *_: ["/bin/echo", said])
    found = tried("peft")["peft"]
    assert found.answer is None and "\x1b" not in found.failure and "gone" in found.failure


@pytest.mark.parametrize(
    ("code", "said"), [(0xC0000005, "it crashed (exit code 0xc0000005)"), (-200, "it crashed (signal 200)")]
)
def test_each_systems_crashes_are_called_so(code: int, said: str) -> None:
    child = SimpleNamespace(process=SimpleNamespace(returncode=code), printed=[b"a line\n", b""])
    assert trial.death(child) == f"{said}: a line"  # type: ignore[arg-type]
