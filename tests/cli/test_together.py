"""The command as one of several processes: refused in two lines before anything is read, or started by a launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli import together
from qlora.errors import HardwareError
from qlora.processes import Place
from qlora.stop import StopRequest
from tests import together as several
from tests.runs import run_dir, write_recipe


@pytest.mark.parametrize("wanted", ["check", "verify-resume"])
def test_what_is_one_process_s_work_is_refused(wanted: str) -> None:
    with (
        pytest.raises(HardwareError, match=f"--{wanted} is one process, and a launcher has started 2"),
        together.joined(Place(0, 2, 0, 2), wanted, StopRequest()),
    ):
        pytest.fail("joined")


def test_a_recipe_that_they_cannot_train_is_refused_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "no-base")
    with recipe.open("a") as file:
        file.write('[[data.documents]]\npath = "manuals"\n')
    ended = several.train(recipe, 2, "memory.shard_weights=true")
    assert ended.codes == [2, 0] and ended.said[1] == "", ended.said
    assert "not built with documents" in ended.said[0] and len(ended.said[0].splitlines()) == 2
    assert not run_dir(recipe).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        # On a machine without cards too: with its word for the CPU, it starts one process.
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    ],
)
def test_as_people_start_it(tmp_path: Path, llama: Path, launcher: tuple[str, ...]) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = ["--set", "train.max_steps=2", "--set", "train.batch_size=2", "--set", "eval.samples=0"]
    port = ["--main_process_port", str(several.free_port())] if "accelerate" in launcher[0] else []
    words = [sys.executable, "-m", *launcher, *port, "-m", "qlora.cli.train", str(recipe), *settings]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and (run_dir(recipe) / "adapter" / "adapter_model.safetensors").is_file()
