"""The whole way on the shipped handbook: a folder of documents in, a model that knows them out, measured."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "manuals.toml"
DOCUMENTS = ("lamps.docx", "valves.md", "sites-and-plans.pdf")  # each kind but one, which takes half of the time of all
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run over three of the five documents with a shorter exam; its folder `study/` and the figures of its exam."""
    documents = tmp_path_factory.mktemp("documents")
    for name in DOCUMENTS:
        shutil.copy(RECIPE.parent / "manuals" / "documents" / name, documents)
    changes = [
        f'data.documents=[{{path="{documents.as_posix()}", about="handbook of Tarvell"}}]',
        f"output.dir={tmp_path_factory.mktemp('runs')}",
        "study.questions=16",
        "exam.questions=60",
        "exam.left_out=0.1",
    ]
    recorder = Recorder()
    result = api.train(load_recipe(RECIPE, changes), name="manuals", sink=recorder)
    return result.run_dir / "study", json.loads((result.run_dir / "study" / "exam.json").read_text(encoding="utf-8"))


def share(figures: dict[str, Any], part: str, column: str) -> float:
    return float(figures["parts"][part]["columns"][column]["right"]["mean"])


def test_it_learns_what_the_handbook_says(run: tuple[Path, dict[str, Any]]) -> None:
    _, figures = run
    assert figures["parts"]["words"]["questions"] >= 60
    print({column: share(figures, "words", column) for column in figures["parts"]["words"]["columns"]})
    assert share(figures, "words", "base") <= 0.1
    assert share(figures, "words", "base_passage") >= 0.85
    assert share(figures, "words", "tuned") >= 0.65


def test_what_was_left_out_stays_unknown(run: tuple[Path, dict[str, Any]]) -> None:
    _, figures = run
    assert figures["parts"]["left_out"]["questions"] >= 20
    assert share(figures, "left_out", "tuned") <= share(figures, "left_out", "base") + 0.1


def test_no_six_words_of_the_exam_stand_in_the_pre_training_text(run: tuple[Path, dict[str, Any]]) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from make_manuals_base import writer_of

    log = (ROOT / "recipes" / "manuals" / "base" / "pretraining_log.jsonl").read_text(encoding="utf-8")
    end = json.loads(log.splitlines()[-1])
    lines = (run[0] / "exam.jsonl").read_text(encoding="utf-8").splitlines()
    told = {six for line in lines for six in _runs(str(json.loads(line)["text"]))}
    assert told
    for text in writer_of(end["seed"]).documents(end["documents"], end["seed"]):
        assert told.isdisjoint(_runs(text))


def _runs(text: str) -> Any:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(6)), strict=False)
