"""The kernels compute what their twins do, and compile for every card that trains: both in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install triton")

# What a program may have of shared memory, of an SM's (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
REGISTERS = 128  # a thread: two programs of 16 warps would need half of an SM's 65,536 each at 64


def said(module: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", f"tests.step.kernels.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_interpreter_gives_what_the_twins_give() -> None:
    """In float32 to rounding, in fp16 to one step of its 11 bits; dequantizing to the bit."""
    found = said("interpreted")
    assert set(found) == {"torch.float32", "torch.float16"}
    for kind, kernels in found.items():
        assert kernels.pop("dequantize") == 0
        assert len(kernels) == 25 and max(kernels.values()) <= (1e-6 if kind == "torch.float32" else 2**-10), kind


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card_without_spilling() -> None:
    found = said("compiled", *map(str, SHARED_BYTES))
    assert len(found) == 9 * len(SHARED_BYTES)
    for name, used in found.items():
        assert used["spilled"] == 0 and used["registers"] <= REGISTERS, name
        assert used["shared"] <= SHARED_BYTES[int(name.split()[1])], name
