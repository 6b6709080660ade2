"""Rows of preference in the words of the hub, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.judged import Judged, to_judged
from qlora.data.row_json import RowError

ASKED, BETTER, WORSE = "What is it?", "A lamp.", "A pump."
USER = {"role": "user", "content": ASKED}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
    "another name of the question": {"question": ASKED, "chosen": BETTER, "rejected": WORSE},
    "instruction": {"instruction": ASKED, "chosen": BETTER, "rejected": WORSE},
    "messages with a prompt": {"prompt": [USER], "chosen": [says(BETTER)], "rejected": [says(WORSE)]},
    "implicit prompt": {"chosen": [USER, says(BETTER)], "rejected": [USER, says(WORSE)]},
    "both": {"prompt": ASKED, "chosen": [USER, says(BETTER)], "rejected": [USER, says(WORSE)]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": BETTER},
        "rejected": {"from": "gpt", "value": WORSE},
    },
    "winner": {"prompt": ASKED, "response_winner": BETTER, "response_loser": WORSE},
    "preferred": {"prompt": ASKED, "preferred": BETTER, "non_preferred": WORSE},
    "scores beside it": {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE, "score_chosen": 5, "score_rejected": 1},
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_a_pair_is_a_question_and_two_answers(name: str) -> None:
    read = to_judged(PAIRS[name], "preference")
    assert read.messages == (USER, says(BETTER)) and read.worse == (USER, says(WORSE))
    assert [sign for _, sign in read.sides] == [1.0, -1.0]


def test_what_both_share_is_context() -> None:
    shared = [{"role": "system", "content": "Be brief."}, USER, says("Which?"), {"role": "user", "content": "That."}]
    read = to_judged({"chosen": [*shared, says(BETTER)], "rejected": [*shared, says(WORSE)]}, "preference")
    trained = [message.get("train", True) for message in read.messages if message["role"] == "assistant"]
    assert trained == [False, True] and read.messages[0]["role"] == "system"
    alpaca = {"instruction": "Translate", "input": "x", "chosen": BETTER, "rejected": WORSE, "system": "Be brief."}
    read = to_judged(alpaca, "preference")
    assert [message["content"] for message in read.worse] == ["Be brief.", "Translate\nx", WORSE]


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "the same": ({"prompt": ASKED, "chosen": BETTER, "rejected": BETTER}, "are the same"),
    "empty": ({"prompt": ASKED, "chosen": BETTER, "rejected": " "}, "rejected is empty"),
    "nothing said": ({"prompt": ASKED, "chosen": [says("")], "rejected": [says(WORSE)]}, "says nothing"),
    "no question": ({"chosen": BETTER, "rejected": WORSE}, "no question"),
    "other questions": (
        {"chosen": [USER, says(BETTER)], "rejected": [{"role": "user", "content": "Who?"}, says(WORSE)]},
        "do not answer the same question",
    ),
    "no answer": ({"chosen": [USER, says(BETTER)], "rejected": [USER]}, "rejected adds no answer"),
    "one column": ({"prompt": ASKED, "chosen": BETTER}, "needs the columns chosen and rejected"),
    "another question beside it": (
        {"prompt": "Who?", "chosen": [USER, says(BETTER)], "rejected": [USER, says(WORSE)]},
        "another question than the turns ask",
    ),
}


@pytest.mark.parametrize("name", list(BAD_PAIRS))
def test_what_is_no_pair_says_why(name: str) -> None:
    row, reason = BAD_PAIRS[name]
    with pytest.raises(RowError) as error:
        to_judged(row, "preference")
    assert reason in error.value.reason


MARKED: dict[str, tuple[dict[str, Any], float]] = {
    "good": ({"prompt": ASKED, "completion": BETTER, "label": True}, 1.0),
    "bad": ({"prompt": ASKED, "completion": BETTER, "label": False}, -1.0),
    "as text": ({"prompt": ASKED, "response": BETTER, "label": "false"}, -1.0),
    "thumbs": ({"prompt": ASKED, "completion": BETTER, "thumbs": "👍"}, 1.0),
    "thumb down": ({"prompt": ASKED, "completion": BETTER, "feedback": "👎"}, -1.0),
    "thumbs_down": ({"prompt": ASKED, "completion": BETTER, "thumbs_down": 1}, -1.0),
    "messages": ({"messages": [USER, says(BETTER)], "kto_tag": False}, -1.0),
    "turns": ({"prompt": [USER], "completion": [says(BETTER)], "label": 1}, 1.0),
}


@pytest.mark.parametrize("name", list(MARKED))
def test_a_marked_answer_has_a_sign(name: str) -> None:
    row, sign = MARKED[name]
    read = to_judged(row, "kto")
    assert read == Judged((USER, says(BETTER)), sign=sign) and len(read.sides) == 1


BAD_MARKS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"prompt": ASKED, "completion": BETTER}, "needs the column label"),
    "neither": ({"prompt": ASKED, "completion": BETTER, "label": "maybe"}, "true or false"),
    "two": ({"prompt": ASKED, "completion": BETTER, "thumbs": "up", "rating": "down"}, "two marks"),
    "pairs": ({"prompt": ASKED, "chosen": BETTER, "rejected": WORSE}, "pairs of answers"),
    "no answer": ({"messages": [USER], "label": True}, "does not end with an answer"),
}


@pytest.mark.parametrize("name", list(BAD_MARKS))
def test_what_is_no_marked_answer_says_why(name: str) -> None:
    row, reason = BAD_MARKS[name]
    with pytest.raises(RowError) as error:
        to_judged(row, "kto")
    assert reason in error.value.reason
