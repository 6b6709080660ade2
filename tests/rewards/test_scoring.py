"""What answers are worth to the rewards of a recipe, and their sum."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora.errors import RewardError
from qlora.events import Recorder
from qlora.recipe.sections import TrainSection
from qlora.rewards.scoring import row_of, try_on
from qlora.rewards.sources import reward_sources
from tests.rewards.cases import PROMPTS, ROWS, function_of, rewards_of


def test_built_in_rewards_are_one_or_nothing() -> None:
    with rewards_of(["exact_match", "regex:^[0-9]$"]) as rewards:
        assert rewards.names == ("exact_match", "regex:^[0-9]$")
        assert rewards.score(PROMPTS, [" 5 ", "x"], ROWS) == [[1, 0], [0, 0]]
        assert rewards.score(PROMPTS, ["<think>9</think>5", "7"], ROWS) == [[1, 0], [1, 1]]
        assert rewards.score([], [], []) == [[], []]


def test_a_pattern_takes_time_linear_in_the_answer() -> None:
    began = time.monotonic()
    with rewards_of(["regex:(a+)+$"]) as rewards:
        assert rewards.score(PROMPTS, ["a" * 50_000 + "b", "aa"], ROWS) == [[0, 1]]
    assert time.monotonic() - began < 5


def test_scores_are_summed_by_their_weights() -> None:
    train = TrainSection(objective="grpo", rewards=("exact_match", "regex:a"), reward_weights=(2.0, -0.5))
    from qlora.rewards.scoring import opened

    with opened(train, reward_sources(train, ()), Recorder()) as rewards:
        assert rewards is not None
        assert rewards.total([[1, 0], [1, 1]]) == [1.5, -0.5]
    with opened(TrainSection(), (), Recorder()) as none:
        assert none is None


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "name": {"type": "string", "pattern": "^(a+)+$"}, "x": {}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_a_schema_judges_strict_json(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema_rs")
    (tmp_path / "answer.json").write_text(json.dumps(SCHEMA))
    answers = [
        '{"n": 3}',
        ' <think>x</think>{"n": 3, "name": "aa"}',
        '{"n": 0}',
        '{"n": 3, "m": 1}',
        "n: 3",
        '{"n": 3, "x": NaN}',
    ]
    answers += [json.dumps({"n": 1, "name": "a" * 40 + "b"}), "[" * 100_000, '```json\n{"n": 3}\n```', '{"n": 1e999}']
    with rewards_of([f"json_schema:{tmp_path / 'answer.json'}"]) as rewards:
        assert rewards.names == ("json_schema:answer.json",)
        (scores,) = rewards.score([""] * 10, answers, [{}] * 10)
    assert scores == [1, 1, *[0] * 8]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nothing"}, "is no JSON schema"),
        ({"$ref": "https://example.org/a.json"}, "nothing is fetched"),
        ({"$ref": "file:///etc/passwd"}, "nothing is fetched"),
        ({"pattern": "(?=a)b"}, "is no JSON schema"),
    ],
)
def test_a_schema_that_cannot_be_used_safely_is_refused(schema: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema_rs")
    (tmp_path / "a.json").write_text(json.dumps(schema))
    with pytest.raises(RewardError, match=said) as error, rewards_of([f"json_schema:{tmp_path / 'a.json'}"]):
        pass
    assert error.value.hint.startswith("mend")


def test_a_row_is_its_columns_its_messages_and_its_answer() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert row_of(messages, "a", {"level": 1, "answer": "other"}) == (
        "q",
        {"level": 1, "messages": messages, "answer": "a"},
    )
    assert row_of([], "a", None) == ("", {"messages": [], "answer": "a"})


def test_the_rows_own_answers_are_judged_first(tmp_path: Path) -> None:
    """So that what a function does wrong is told before weights are read, and a reward of nothing is seen."""
    questions = [SimpleNamespace(messages=[], expected=str(at), columns={"at": at}) for at in range(30)]
    split: Any = SimpleNamespace(lengths=[1] * 30, prompt=questions.__getitem__)
    source = "def score(completions, at):\n    return [n == int(c) and n % 2 for n, c in zip(at, completions)]\n"
    recorder = Recorder()
    with rewards_of(["exact_match", "regex:crowns"], [function_of(tmp_path, source)]) as rewards:
        try_on(rewards, split, recorder)
    said = recorder.of("notice")[0].as_dict()["message"]
    assert said == "of 20 rows, the rows' own answers are worth: exact_match 1, regex:crowns 0, rewards.py:score 0.5"
    try_on(None, split, recorder)
    assert len(recorder.of("notice")) == 1
