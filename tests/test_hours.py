"""Hours and memory before a run: in `qlora-data`, in `qlora-estimate`, in `qlora-train --check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora import api
from qlora.cli.data import app as data
from qlora.cli.estimate import app as estimate
from qlora.cli.train import app as train
from qlora.events import Recorder
from qlora.hours import hours_of
from qlora.look import look_at_data
from qlora.recipe.reading import load_recipe
from qlora.study.amount import Documents
from tests.training.cases import write_manuals


def test_a_card_s_figures_and_the_recipe_s_limit_of_time(tmp_path: Path, llama: Path) -> None:
    recipe = write_manuals(tmp_path, llama)
    documents = Documents(passages=2000, tokens=300, sentences=20_000)
    found = {}
    for card in ("RTX 3060 12GB", "RTX 4090"):
        question = api.question(load_recipe(recipe), gpu=card)
        found[card] = hours_of(question.recipe, documents, False, question.estimator)
        assert card in found[card].where and not found[card].limited
    assert found["RTX 4090"].study[1] <= found["RTX 3060 12GB"].study[1]
    question = api.question(load_recipe(recipe, ["study.max_minutes=1"]), gpu="RTX 3060 12GB")
    limited = hours_of(question.recipe, documents, False, question.estimator)
    assert limited.study[1] == 60 and limited.limited and limited.exam == found["RTX 3060 12GB"].exam


def test_shown_before_anything_is_loaded(tmp_path: Path, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_manuals(tmp_path, llama)
    page = tmp_path / "page.html"
    for app, asked in ((data, ["--html", str(page)]), (estimate, ["--vram", "8GB"]), (train, ["--check"])):
        with pytest.raises(SystemExit) as end:
            app([str(recipe), *asked])
        said = " ".join(capfd.readouterr().out.split())
        assert end.value.code == 0 and "time to come: about" in said and "training" in said, asked
        if app is not estimate:
            assert "memory to come:" in said and "study" in said.partition("memory to come:")[2]
    text = page.read_text(encoding="utf-8")
    assert "time to come: about" in text and "memory to come:" in text


def test_the_same_in_json(tmp_path: Path, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        estimate([str(write_manuals(tmp_path, llama)), "--vram", "8GB", "--json"])
    answer = json.loads(capfd.readouterr().out)
    least, most = answer["hours"]["study"]
    assert 0 < least < most and {"study", "exam"} <= set(answer["phases"])


def test_a_base_that_cannot_be_simulated_is_looked_at_all_the_same(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.errors import ModelError
    from qlora.memory.question import Question

    def refuses(self: Question) -> None:
        raise ModelError("base: a step of this model cannot be simulated", "use another")

    monkeypatch.setattr(Question, "estimate", refuses)
    sink = Recorder()
    seen = look_at_data(write_manuals(tmp_path, llama), sink=sink)
    assert seen.documents is not None and seen.documents.ahead is not None
    assert seen.documents.ahead.hours is None and seen.documents.ahead.memory is None
    assert any("cannot be simulated" in str(event) for event in sink.of("notice"))
