"""`qlora-estimate` of several cards: what each needs, has and computes, as a table and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.cli import estimate
from tests.memory.shapes import config_folder

Run = Callable[..., subprocess.CompletedProcess[str]]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["qlora-estimate", *arguments])
        with pytest.raises(SystemExit) as end:
            estimate.app()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out, err)

    return command


def test_several_cards_in_json_and_as_a_table(run: Run, tmp_path: Path) -> None:
    asked = (str(config_folder(BASE, tmp_path)), "--set", "train.gradient_checkpointing=true")
    done = run(*asked, "--gpu", "3090", "--gpu", "3060 12GB", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    cards = answer["cards"]
    assert [one["card"] for one in cards] == ["RTX 3090, 24 GB", "RTX 3060 12GB"] and answer["fits"]
    assert sum(one["packs_of_step"] for one in cards) == answer["batch_size"] == 16
    assert cards[0]["share"] > cards[1]["share"] > 0 and sum(one["share"] for one in cards) == pytest.approx(1)
    for one in cards:
        assert sum(one["components"].values()) == one["peak_bytes"] and one["components"]["exchange"] > 0
    alone = [one["tokens_per_second_alone"] for one in cards]
    assert max(alone) < answer["tokens_per_second"] < sum(alone) and answer["gradient_bytes_exchanged"] > 0
    shown = run(*asked, "--gpu", "3090", "--gpu", "3060 12GB").stdout
    assert "RTX 3060 12GB" in shown and "of all together" in shown and "it fits" in shown
    assert f"{cards[0]['share']:.0%}" in shown


def test_a_card_that_cannot_hold_its_part_is_named(run: Run, tmp_path: Path) -> None:
    asked = (str(config_folder(BASE, tmp_path)), "--set", "train.gradient_checkpointing=true")
    done = run(*asked, "--vram", "24GB", "--vram", "700MiB")
    assert done.returncode == 3
    assert "process 1 of 2, 700MiB, cannot hold its part" in done.stderr and len(done.stderr.splitlines()) == 2
    assert "leave that card out" in done.stderr and "700MiB cannot hold its part" in done.stdout


def test_what_is_of_one_card_is_refused(run: Run, tmp_path: Path) -> None:
    folder = str(config_folder(BASE, tmp_path))
    for flags in (("--explain",), ("--plot", str(tmp_path / "a.png")), ("--stack", "plain")):
        done = run(folder, "--gpu", "2x 3090", *flags)
        assert done.returncode == 2 and f"{flags[0]}: of one card, and 2 are asked about" in done.stderr
    for words in (("--gpu", "3090", "--vram", "8GB"), ("--gpu", "0x 3090"), ("--gpu", "99x 3090")):
        assert run(folder, *words).returncode == 2
