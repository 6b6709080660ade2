"""What kernels compute and take, asked in processes of their own: Triton asks once how it is to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")
# What a program may have of shared memory, of an SM's (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
REGISTERS = 128  # a thread: two programs of 16 warps would need half of an SM's 65,536 each at 64


def said(module: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", f"tests.step.kernels.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def fits_every_card(found: dict[str, dict[str, int]]) -> None:
    """Of kernels by name and capability: nothing is spilled, and registers and shared memory are there."""
    for name, used in found.items():
        assert used["spilled"] == 0 and used["registers"] <= REGISTERS, name
        assert used["shared"] <= SHARED_BYTES[int(name.split()[-1])], name
