"""Rows of grpo in the words of the hub, and those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data.prepare import prepare
from qlora.data.rewarded import to_rewarded
from qlora.data.row_json import RowError
from qlora.data.token_cache import Prompt
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import family_chat

ASKED = "What is 2+3?"
USER, RIGHT = {"role": "user", "content": ASKED}, {"role": "assistant", "content": "5"}
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED, "answer": "5"},
    "a number": {"question": ASKED, "answer": 5},
    "a way beside it": {"problem": ASKED, "solution": "2 + 3 = 5", "answer": "5"},
    "a solution alone": {"problem": ASKED, "solution": "5"},
    "prompt of turns": {"prompt": [USER], "answer": "5"},
    "verl": {"prompt": [USER], "reward_model": {"ground_truth": "5", "style": "rule"}, "data_source": "x"},
    "messages that end with it": {"messages": [USER, RIGHT]},
    "messages and an answer": {"messages": [USER], "answer": "5"},
    "messages with a way": {"messages": [USER, {"role": "assistant", "content": "Well, 5."}], "answer": "5"},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}], "ground_truth": "5"},
    "supervised": {"prompt": ASKED, "completion": "5"},
    "the same twice": {"prompt": ASKED, "answer": "5", "ground_truth": 5},
    "tools": {"prompt": ASKED, "answer": "5", "tools": [{"type": "function", "function": {"name": "f"}}]},
    "columns of functions": {"prompt": ASKED, "answer": "5", "level": 3, "tests": ["a", "b"]},
}


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_is_a_question_and_its_right_answer(name: str) -> None:
    read = to_rewarded(ROWS[name])
    assert read.messages == (USER, RIGHT) and dict(read.columns) == ROWS[name] and not read.remarks


def test_earlier_answers_are_context() -> None:
    read = to_rewarded({"messages": [USER, RIGHT, {"role": "user", "content": "And 3+4?"}], "answer": "7"})
    assert [message.get("train", True) for message in read.messages if message["role"] == "assistant"] == [False, True]
    with_system = to_rewarded({"system_prompt": "Be brief.", "prompt": ASKED, "answer": "5"})
    assert [message["role"] for message in with_system.messages] == ["system", "user", "assistant"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"prompt": ASKED}, "needs a question and the column answer; this row has: prompt"),
    "no last answer": ({"messages": [USER]}, "no right answer beside the question"),
    "an empty one": ({"prompt": ASKED, "answer": " "}, "answer is empty"),
    "no text": ({"prompt": ASKED, "answer": ["5", "five"]}, "answer is no text"),
    "two answers": ({"prompt": ASKED, "answer": "5", "ground_truth": "6"}, "several columns may be the right answer"),
    "no question": ({"answer": "5"}, "no question beside answer"),
    "pairs": ({"prompt": ASKED, "chosen": "5", "rejected": "6"}, "pairs of answers"),
    "a text": ({"text": "hello"}, "does not end with an answer"),
    "very large": ({"prompt": ASKED, "answer": "5", "x": "y" * 1_100_000}, "rows of grpo keep up to"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_row_of_grpo_says_why(name: str) -> None:
    row, reason = BAD[name]
    with pytest.raises(RowError) as error:
        to_rewarded(row)
    assert reason in error.value.reason


def test_a_second_question_is_told() -> None:
    assert [remark.name for remark in to_rewarded({"question": "a", "prompt": "b", "answer": "c"}).remarks] == [
        "question"
    ]


def test_rows_are_kept_with_their_columns(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}+1?", "answer": n + 1, "level": n} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, {"question": "x"})))
    source = SourceSection(path=str(tmp_path / "rows.jsonl"), format="grpo")
    recorder = Recorder()
    for _ in range(2):  # read, and read from the cache
        section = DataSection(train=(source,), eval_fraction=0, max_bad_rows=1)
        data = prepare(section, "f", family_chat("qwen2"), 0, tmp_path / "cache", recorder)
        asked = {"role": "user", "content": "What is 0+1?"}
        assert data.train.prompt(0) == Prompt([asked], None, "1", rows[0])
        assert data.train.preference is None and all(data.train.trained)
    assert "needs a question and the column answer" in recorder.of("rejected")[0].as_dict()["reason"]
