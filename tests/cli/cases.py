"""What tests of the commands share: a command run as a user runs it, and the two lines of an error."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path


def run(*arguments: str, cwd: Path, module: str = "train") -> tuple[int, str, str, float]:
    started = time.monotonic()
    command = [sys.executable, "-m", f"qlora.cli.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def expect_two_lines(result: tuple[int, str, str, float], message: str) -> None:
    code, _, error, _ = result
    assert code == 2, error
    assert "Traceback" not in error
    lines = error.strip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert re.search(message, lines[first]), error
    assert lines[first + 1].startswith("       ") and len(lines[first + 1].strip()) > 10
