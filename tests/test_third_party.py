"""Other libraries inside our commands: how their threads wait, and what they load before anybody needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from qlora import cores
from qlora.third_party import (
    ALONE,
    WAITING_THREADS,
    _compile_when_called,
    draw_no_bars,
    let_waiting_threads_sleep,
    unprinted_panics,
)

# A command that has ended: what it left in the environment, and whether torch had been imported by then.
COMMAND = """
import json, os, sys
from qlora import cores
from qlora.cli import common
cores.are_free = lambda: False
from qlora.third_party import WAITING_THREADS
seen = {}
def work():
    seen.update({name: os.environ.get(name) for name in WAITING_THREADS}, torch="torch" in sys.modules)
common.run(work)
print(json.dumps(seen))
"""


def waiting(**environment: str) -> dict[str, object]:
    """What a command's work finds in its environment."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITING_THREADS, "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_bar_of_somebody_else_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: whoever has imported tqdm before has its settings."""
    monkeypatch.setenv("TQDM_DISABLE", "")
    draw_no_bars()
    code = "from tqdm.auto import tqdm; [None for _ in tqdm(range(3), desc='of a stranger')]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_waiting_threads_sleep_before_torch_is_there() -> None:
    assert waiting() == {**WAITING_THREADS, "torch": False}


@pytest.mark.parametrize("free", [True, False])
def test_where_nobody_else_computes_they_wait_longer(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WAITING_THREADS, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "7")  # which is there again after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(cores, "are_free", lambda: free)
    let_waiting_threads_sleep()
    assert {name: os.environ[name] for name in WAITING_THREADS} == WAITING_THREADS | (ALONE if free else {})


@pytest.mark.parametrize("name", [*WAITING_THREADS, "OMP_WAIT_POLICY"])
def test_whoever_has_chosen_decides(name: str) -> None:
    found = waiting(**{name: "7"})
    assert found == {
        **dict.fromkeys(WAITING_THREADS),
        **({name: "7"} if name in WAITING_THREADS else {}),
        "torch": False,
    }


def test_what_a_library_writes_past_python_is_lost_inside_the_block_only(capfd: pytest.CaptureFixture[str]) -> None:
    with unprinted_panics():
        os.write(2, b"panicked at \x1b]0;title\x07")
    os.write(2, b"after")
    with pytest.raises(KeyError), unprinted_panics():
        raise KeyError
    os.write(2, b" and again")
    assert capfd.readouterr().err == "after and again"


def test_a_process_without_a_second_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("os.dup", refuse)
    with unprinted_panics():
        pass


def test_bitsandbytes_is_imported_without_the_compiler_and_torch_is_as_it_was() -> None:
    code = (
        "import sys, torch\n"
        "before = torch.compile\n"
        "from qlora.third_party import import_bitsandbytes\n"
        "assert import_bitsandbytes() is import_bitsandbytes() is sys.modules['bitsandbytes']\n"
        "assert torch.compile is before\n"
        "assert 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_marked_for_compiling_is_compiled_once_when_it_is_called() -> None:
    asked: list[object] = []

    def compile_now(function: Callable[[int], int], **settings: object) -> Callable[[int], int]:
        asked.append(settings)
        return lambda value: function(value) + 1

    def double(value: int) -> int:
        return 2 * value

    marked = (_compile_when_called(compile_now, double), _compile_when_called(compile_now, dynamic=False)(double))
    assert asked == []
    assert [function(3) for function in (*marked, *marked)] == [7, 7, 7, 7]
    assert asked == [{}, {"dynamic": False}]
