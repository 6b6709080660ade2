"""`qlora-report`: where its page is, what it refuses in two lines, and how a watch ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora import lock
from qlora.cli.report import app
from tests.report.pages import judged
from tests.report.runs_told import start, step, whole, write


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        app(list(arguments))
    return int(end.value.code or 0)


def test_it_says_where_the_page_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "one", whole()), write(tmp_path / "other", whole())
    assert run(str(one)) == 0
    assert capfd.readouterr().out == f"{one / 'report.html'}\n"
    assert run(str(one), str(other), "--out", str(tmp_path / "both.html")) == 0
    judged((tmp_path / "both.html").read_text())


def test_what_is_wrong_is_two_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = write(tmp_path / "run", whole())
    (tmp_path / "mine.html").write_text("mine")
    for arguments, why in (
        ([str(tmp_path / "nothing")], "no such folder"),
        ([str(tmp_path)], "holds no events.jsonl"),
        ([str(run_dir), "--out", str(tmp_path / "mine.html")], "--out: "),
        ([], "RUN"),
    ):
        assert run(*arguments) == 2
        said = capfd.readouterr()
        assert len(said.err.strip().splitlines()) == 2 and why in said.err and not said.out


def test_ctrl_c_ends_a_watch_in_two_lines(tmp_path: Path) -> None:
    run_dir = write(tmp_path, [start(), step(1)])
    held = lock.acquire(run_dir / ".lock")
    command = [sys.executable, "-m", "qlora.cli.report", str(run_dir), "--watch"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watching:
        for _ in range(1_000):
            if (run_dir / "report.html").exists():
                break
            time.sleep(0.05)
        os.kill(watching.pid, signal.SIGINT)
        _, said = watching.communicate(timeout=60)
    held.release()
    assert watching.returncode == 130 and "the page stands as it was last" in said and len(said.splitlines()) == 2
    assert "refresh" not in (run_dir / "report.html").read_text()
