"""`qlora-chat` for scripts: the answer on stdout, all else on stderr, and what is wrong in two lines."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora.ask.llama import LlamaModel
from qlora.cli.chat import app
from tests.ask.cases import ToyLlama, call, toy_model, user
from tests.cli import cases

LIVE = ToyLlama(lambda question: f"\x1b[31m{question}")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file that the toy answers for."""

    @contextmanager
    def opened(*_: Any) -> Iterator[LlamaModel]:
        yield toy_model(LIVE)

    monkeypatch.setattr("qlora.ask.opened.open_model", opened)
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    return tmp_path / "toy.gguf"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        app(list(arguments))
    return int(end.value.code or 0)


def test_an_answer_alone_is_on_stdout(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(str(file), "--prompt", "hi", "--temperature", "0") == 0
    said = capfd.readouterr()
    assert said.out == "␛[31mhi\n" and said.err == ""
    assert run(str(file), "-p", "hi", "--temperature", "0", "--max-tokens", "2") == 0
    said = capfd.readouterr()
    assert said.out == "␛[\n" and "--max-tokens" in said.err


def test_a_question_is_piped_in(file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert run(str(file), "--temperature", "0") == 0
    assert capfd.readouterr().out == "␛[31mtwo\nlines\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", " "], ["--prompt", "hi", "--compare"], ["--prompt", "hi", "--temperature", "nan"],
        ["--prompt", "hi", "--top-p", "2"], ["--prompt", "hi", "--serve", "1"], ["--serve", "1", "--compare"],
        ["--serve", "70000"], ["--prompt", "hi", "--context", "2"], ["--prompt", "hi", "--max-tokens", "0"],
        ["--prompt", "x" * 900], ["--prompt"], ["--prompt", "hi", "--beams", "4"],
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_two_lines(file: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(str(file), *arguments) == 2
    said = capfd.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 2


def test_a_name_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    found = cases.run(str(tmp_path / "nothing"), "-p", "hi", cwd=tmp_path, module="chat")
    cases.expect_two_lines(found, "no such file or folder")


def test_a_port_that_is_taken_is_refused_before_the_model_is_opened(
    file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.ask.transport import LocalServer

    monkeypatch.setattr("qlora.ask.opened.open_model", lambda *_: pytest.fail("it was opened"))
    with LocalServer(0) as taken:
        taken.listen()
        assert run(str(file), "--serve", str(taken.server_port)) == 2
    said = capfd.readouterr()
    assert len(said.err.strip().splitlines()) == 2 and "cannot be had" in said.err


@pytest.mark.slow
def test_a_model_is_served_until_ctrl_c(llama: Path) -> None:
    """By a real process, which Ctrl-C ends with 0."""
    common = (str(llama), "--temperature", "0", "--max-tokens", "8")
    command = [sys.executable, "-m", "qlora.cli.chat", *common, "--serve", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert server.stderr is not None
    line = next(line for line in server.stderr if "is served" in line)
    port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
    served: Any = type("Served", (), {"server_port": port})
    status, answer = call(served, {"messages": [user("hi")]})
    assert status == 200 and 0 < answer["usage"]["completion_tokens"] <= 8
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0 and "ended" in server.stderr.read()
