"""Tokenized rows on the disk: what is written comes back to the bit, whichever rows are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.data.chat import TokenRow
from qlora.data.formats import Conversation
from qlora.data.token_cache import MadeRow, Prompt, RowWriter, StoredRows, open_rows

USER, ANSWER = {"role": "user", "content": "What? 🌧"}, {"role": "assistant", "content": "It."}
TALK = Conversation((USER, ANSWER))
ROWS = [
    (TokenRow([5, 6, 7], [0.0, 1.0, 0.25]), TALK, "a.jsonl:1", 0),
    (TokenRow([5, 6, 7], [1.0, 1.0, 1.0]), Conversation(text="a b c"), "a.jsonl:2", 0),
    (TokenRow([9], [0.0]), Conversation((USER, ANSWER, USER)), "b.jsonl:1", 1),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredRows:
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    with RowWriter(path) as writer:
        for rows in (ROWS[:2], ROWS[2:]):
            writer.write([(MadeRow.of(row, talk), where, source) for row, talk, where, source in rows])
    return open_rows(path, "tokens")


def test_rows_come_back_with_their_counts_and_places(stored: StoredRows) -> None:
    split = stored.split()
    assert list(split.rows) == [row for row, *_ in ROWS]
    assert list(split.lengths) == [3, 3, 1] and list(split.trained) == [2, 3, 0]
    assert list(split.wheres) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"] and list(split.sources) == [0, 0, 1]
    assert split.rows[-1:] == [ROWS[2][0]]


def test_chosen_rows_come_in_the_order_given(stored: StoredRows) -> None:
    split = stored.split([2, 0])
    assert list(split.wheres) == ["b.jsonl:1", "a.jsonl:1"] and list(split.lengths) == [1, 3]
    assert split.rows[1] == ROWS[0][0] and len(split.rows) == 2
    assert split.prompt(1) == Prompt([USER], None, "It.")


def test_equal_tokens_have_equal_digests(stored: StoredRows) -> None:
    assert stored.digests[0] == stored.digests[1] != stored.digests[2]


def call() -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (TALK, Prompt([USER], None, "It.")),
        (Conversation((USER, ANSWER, USER)), Prompt([USER], None, "It.")),
        (Conversation((USER, ANSWER), ({"name": "f"},)), Prompt([USER], [{"name": "f"}], "It.")),
        (Conversation((USER, call())), None),
        (Conversation((USER, {**ANSWER, "train": False})), None),
        (Conversation((ANSWER, USER)), None),
        (Conversation(text="plain"), None),
    ],
    ids=["answer", "a question follows", "tools", "a call", "not trained", "nothing before it", "text"],
)
def test_a_prompt_is_what_stands_before_the_last_answer_in_words(
    conversation: Conversation, expected: Prompt | None, tmp_path: Path
) -> None:
    with RowWriter(tmp_path / "rows.arrow") as writer:
        writer.write([(MadeRow.of(TokenRow([1], [1.0]), conversation), "a.jsonl:1", 0)])
    assert open_rows(tmp_path / "rows.arrow", "tokens").split().prompt(0) == expected


def test_the_content_tells_weights_and_borders_of_rows_apart(tmp_path: Path) -> None:
    def content(*rows: TokenRow) -> str:
        with RowWriter(tmp_path / "rows.arrow") as writer:
            writer.write([(MadeRow.of(row, TALK), "a.jsonl:1", 0) for row in rows])
            return writer.content_sha256()

    whole = content(TokenRow([1, 0], [0.0, 1.0]))
    assert content(TokenRow([1, 0], [0.0, 1.0])) == whole
    others = (
        content(TokenRow([1, 0], [0.0, 0.5])),
        content(TokenRow([1], [0.0]), TokenRow([0], [1.0])),  # one after the other the same bytes
        content(TokenRow([0, 1], [0.0, 1.0])),
    )
    assert len({whole, *others}) == 4
