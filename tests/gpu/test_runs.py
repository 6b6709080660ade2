"""On a GPU: runs in fp16 and with compiled layers, stopped and resumed, are the runs that were never stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qlora.device import current, is_card
from tests.runs import hashes, train, values, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_card(current()), reason="needs a CUDA GPU"),
]
SETTINGS = ("train.max_steps=6", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96")


@pytest.mark.parametrize("changed", ["model.dtype=fp16", "model.compile=true"])
def test_it_is_the_same_when_resumed_and_learns_as_much(tmp_path: Path, llama: Path, changed: str) -> None:
    plain, one, two = (write_recipe(tmp_path / name, llama) for name in ("plain", "one", "two"))
    wanted = values(train(plain, *SETTINGS), "step", "loss")
    found = values(train(one, *SETTINGS, changed), "step", "loss")
    assert all(math.isclose(ours, theirs, rel_tol=0.01) for ours, theirs in zip(found, wanted, strict=True))
    train(two, *SETTINGS, changed, stop_after=3)
    train(two, *SETTINGS, changed, mode="resume")
    assert hashes(two, 6) == hashes(one, 6)


def test_auto_says_both_figures_or_why_not(tmp_path: Path, llama: Path) -> None:
    recorder = train(write_recipe(tmp_path, llama), *SETTINGS)
    (said,) = [event.as_dict()["message"] for event in recorder.of("notice") if event.as_dict()["topic"] == "compile"]
    assert "torch's compiler" in said
