"""A real kernel: the interrupt that a notebook's button sends, errors as it shows them, a cell run twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_dir, write_recipe

pytestmark = pytest.mark.slow
STEPS = 3_000  # more than are done until the panel is seen: only the interrupt ends it


class Kernel:
    """One that is driven as a notebook drives it."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, interrupt_at: str | None = None) -> dict[str, Any]:
        """What a cell shows, by output; it is interrupted once, when `interrupt_at` is on the page."""
        found: dict[str, Any] = {"outputs": {}, "streams": "", "error": None, "updates": 0}
        mine = self.client.execute(code)
        begun = time.monotonic()
        while True:
            assert time.monotonic() - begun < 120
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != mine:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind in ("display_data", "update_display_data", "execute_result"):
                key = content.get("transient", {}).get("display_id", kind)
                found["updates"] += kind == "update_display_data"
                assert kind != "update_display_data" or key in found["outputs"]
                found["outputs"][key] = content["data"].get("text/plain", "")
                if interrupt_at is not None and interrupt_at in found["outputs"][key]:
                    self.manager.interrupt_kernel()
                    interrupt_at = None
            elif kind == "stream":
                found["streams"] += content["text"]
            elif kind == "error":
                found["error"] = content["traceback"]
            elif kind == "status" and content["execution_state"] == "idle":
                return found


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    opened = Kernel()
    yield opened
    opened.close()


def test_a_run_is_interrupted_resumed_and_not_begun_twice(kernel: Kernel, tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    overrides = [f"train.max_steps={STEPS}", "checkpoint.every_minutes=600"]
    kernel.run(f"import qlora\nrecipe = qlora.Recipe.from_file({str(recipe)!r}, {overrides})\nkept = 'kept'")
    train = "qlora.train(recipe, name='tiny'{})"

    stopped = kernel.run(train.format(""), interrupt_at="gradient norm")
    assert stopped["error"] is not None and len(stopped["error"]) == 2, "two lines, and no traceback"
    assert "stopped by SIGINT" in stopped["error"][0] and "mode='resume'" in stopped["error"][1]
    assert list((run_dir(recipe) / "checkpoints").glob("step-*")), "what was done is saved"
    assert len(stopped["outputs"]) == 1 and stopped["updates"] > 0, "one output, drawn over"
    assert stopped["streams"] == ""

    again = kernel.run(train.format(""))
    assert len(again["error"]) == 2 and "holds a run already" in again["error"][0]

    resumed = kernel.run(train.format(", mode='resume'"), interrupt_at="gradient norm")
    (page,) = resumed["outputs"].values()
    assert "going on after step" in page and len(resumed["error"]) == 2
    assert kernel.run("print(kept)")["streams"] == "kept\n", "the kernel and what it holds live on"


def test_another_thread_has_no_interrupt_and_says_so(kernel: Kernel, tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    code = f"""
import threading, qlora
recipe, found = qlora.Recipe.from_file({str(recipe)!r}, ["train.max_steps=2"]), []
thread = threading.Thread(target=lambda: found.append(qlora.train(recipe, name="threaded")))
thread.start(); thread.join(100)
print(found[0].state.step)
"""
    shown = kernel.run(code)
    assert shown["error"] is None and shown["streams"] == "2\n"
    assert "which no interrupt reaches" in "".join(shown["outputs"].values())
