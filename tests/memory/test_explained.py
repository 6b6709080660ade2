"""Where the peak stands: every moment of a run, what no tensor shows included, and what each change would save."""

from __future__ import annotations

import pytest

from qlora import api
from qlora.memory.changes import changed
from qlora.memory.explained import Explained
from qlora.memory.question import Question
from tests.memory.shapes import config_folder


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    folder = config_folder("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path_factory.mktemp("base"))
    return api.question(api.recipe_or_model(str(folder), ["eval.samples=0"]), vram="4GiB")


@pytest.fixture(scope="module")
def explained(question: Question) -> Explained:
    return question.explain(question.decided())


def test_the_peak_is_the_estimate_s(explained: Explained) -> None:
    estimate = explained.plan.estimate
    highest = explained.moments[explained.peak]
    assert highest.total == estimate.peak_bytes and dict(highest.parts) == dict(estimate.components)


def test_what_a_change_saves_is_what_it_saves(explained: Explained, question: Question) -> None:
    recipe, before = explained.plan.recipe, explained.plan.estimate
    assert {"data.max_length": 1024} in [one.changes for one in explained.changes]
    for one in explained.changes:
        after = question.estimator.estimate(changed(recipe, one.changes))
        assert one.saved_bytes == before.needed_bytes - after.needed_bytes


def test_json_has_every_layer(explained: Explained) -> None:
    answer = explained.as_dict()
    assert len([one for one in answer["moments"] if one["phase"] == "forward"]) == 30
    assert sum(answer["moments"][answer["peak_at"]]["bytes"].values()) == explained.plan.estimate.peak_bytes
    assert all(one["lines"] and isinstance(one["fits"], bool) for one in answer["changes"])
