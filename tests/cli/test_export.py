"""`qlora-export`: what it prints, and what a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli import cards, export
from qlora.errors import HardwareError
from tests.cli.cases import expect_two_lines, run
from tests.export.cases import KINDS, edit, trained


def test_export_of_nothing(tmp_path: Path) -> None:
    expect_two_lines(run(str(tmp_path / "none"), cwd=tmp_path, module="export"), "no such folder")


def test_a_card_that_torch_cannot_use_is_refused_as_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise HardwareError("a card is here that torch can't use", "install a driver")

    monkeypatch.setattr(cards, "settle", refused)
    with pytest.raises(HardwareError, match="a card is here"):
        export._run(Path("none"), {}, {}, as_json=True)


@pytest.mark.slow
def test_the_command_prints_json(tmp_path: Path, llama: Path) -> None:
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    edit(tmp_path / "adapter" / "qlora.json", base="/home/anna/models/llama")  # it comes from another machine
    command = [sys.executable, "tools/merge_and_export.py", str(tmp_path / "adapter"), "--to", "gguf", "--quant", "f16"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--no-verify"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and "--base-model" in done.stderr and "recipe" not in done.stderr
    command += ["--no-verify", "--json", "--base-model", str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["merge_base"] == "nf4" and said["choice"] is None and said["products"][0]["format"] == "gguf-f16"
    assert Path(said["products"][0]["folder"]).is_dir()
