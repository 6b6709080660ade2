"""`python -m qlora.prove` is the command."""

from __future__ import annotations

import subprocess
import sys

from tests.floors import ROOT


def test_it_is_the_command() -> None:
    command = [sys.executable, "-m", "qlora.prove", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout and "--json" in done.stdout and "--model" in done.stdout
