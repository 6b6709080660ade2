"""What tests of the commands share: a command run as a user runs it, and the two lines of an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks.terminals import command, with_streams


def run(*arguments: str, cwd: Path, module: str = "train") -> tuple[int, str, str, float]:
    started = time.monotonic()
    words = [sys.executable, "-m", f"qlora.cli.{module}", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def run_in_a_fork(*arguments: str, cwd: Path, module: str = "train") -> tuple[int, str, str, float]:
    """The same in a child that has everything imported: for what is no matter of imports."""
    with tempfile.TemporaryDirectory() as place:
        files = [f"{place}/{stream}" for stream in ("out", "err")]
        given = {0: os.devnull, 1: files[0], 2: files[1]}
        started = time.monotonic()
        code = with_streams(command(module, *arguments), given, before=lambda: os.chdir(cwd))
        out, error = (Path(file).read_text() for file in files)
    return code, out, error, time.monotonic() - started


def expect_two_lines(result: tuple[int, str, str, float], message: str) -> None:
    code, _, error, _ = result
    assert code == 2, error
    assert "Traceback" not in error
    lines = error.strip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert re.search(message, lines[first]), error
    assert lines[first + 1].startswith("       ") and len(lines[first + 1].strip()) > 10
