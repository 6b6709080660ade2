"""A run with compiled layers: its choice is recorded, a resumed run takes it, and is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.model import compiled
from tests.runs import hashes, train, values, write_recipe

SETTINGS = ("train.max_steps=4", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96")
WHOLE = (*SETTINGS, "model.compile=true")


def test_a_run_that_is_compiled_is_resumed_compiled(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    one, two = (write_recipe(tmp_path / name, llama) for name in ("one", "two"))
    recorder = train(one, *WHOLE)
    assert values(recorder, "start", "numerics")[0]["compiled"] is True
    said = [event.as_dict()["message"] for event in recorder.of("notice") if event.as_dict()["topic"] == "compile"]
    assert len(said) == 1 and "s with the first step" in said[0]
    train(two, *WHOLE, stop_after=2)
    again = train(two, *WHOLE, mode="resume")
    assert values(again, "start", "numerics")[0]["compiled"] is True
    assert hashes(two, 4) == hashes(one, 4)


def test_on_a_cpu_auto_is_off(tmp_path: Path, llama: Path) -> None:
    recorder = train(write_recipe(tmp_path, llama), *SETTINGS)
    assert values(recorder, "start", "numerics")[0]["compiled"] is False
    assert not [event for event in recorder.of("notice") if event.as_dict()["topic"] == "compile"]
