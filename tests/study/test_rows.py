"""Rows of a study: shares, order, tokens with their labels, and conversations that any trainer reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlora.data.conversations import conversations
from qlora.data.formats import Conversation
from qlora.data.prepare import NO_ROWS, PreparedData
from qlora.recipe.sections import SourceSection
from qlora.study import rows
from qlora.study.labels import COLUMNS, Labels, one_token
from qlora.study.rows import Shares, StudyRow
from tests.data.cases import split_of


def row(number: int, answer: int = 2, prompt: int = 3) -> StudyRow:
    tokens = np.arange(100 * number, 100 * number + answer + 1, dtype=np.int32)
    places = [one_token(int(token)) for token in tokens]
    labels = Labels(tokens, np.stack([ids for ids, _ in places]), np.stack([logprobs for _, logprobs in places]))
    return StudyRow(f"Question {number}?", tuple(range(prompt)), f"answer {number}", labels)


@pytest.mark.parametrize("shares", [Shares(0.1, 0.1), Shares(0.3, 0.0), Shares(0.0, 0.0), Shares(0.4, 0.4)])
def test_shares_are_of_all_rows(shares: Shares) -> None:
    shown, held = shares.counts(1000)
    whole = 1000 + shown + held
    assert shown / whole == pytest.approx(shares.with_passage, abs=1e-3)
    assert held / whole == pytest.approx(shares.hold, abs=1e-3)


def test_one_key_more_moves_no_other() -> None:
    keys = [f"key {number}" for number in range(50)]
    before = [keys[at] for at in rows.in_drawn_order(keys, 7, "hold")]
    more = [*keys[:20], "another", *keys[20:]]
    after = [more[at] for at in rows.in_drawn_order(more, 7, "hold")]
    assert [key for key in after if key != "another"] == before != keys
    assert [keys[at] for at in rows.in_drawn_order(keys, 8, "hold")] != before


def test_the_own_passage_is_shown_once_and_at_no_fixed_place() -> None:
    places = set()
    for number in range(30):
        shown = rows.among_others("own", ["far", "own", "near", "other"], 7, f"key {number}")
        assert sorted(shown) == ["far", "near", "own"]
        places.add(shown.index("own"))
    assert places == {0, 1, 2}
    assert rows.among_others("own", [], 7, "key") == ["own"]


def test_rows_are_conversations_that_our_own_reader_takes_whole(tmp_path: Path) -> None:
    rows.write(tmp_path, [row(1), row(2)])
    source = SourceSection(path=str(tmp_path / rows.ROWS_FILE))
    found = [conversation for _, conversation in conversations(source, {})]
    assert all(isinstance(one, Conversation) and not one.remarks for one in found)
    read = [[message["content"] for message in one.messages] for one in found if isinstance(one, Conversation)]
    assert read == [["Question 1?", "answer 1"], ["Question 2?", "answer 2"]]
    assert all(set(json.loads(line)) == {"messages"} for line in (tmp_path / rows.ROWS_FILE).read_text().splitlines())


def test_tokens_and_labels_of_a_row() -> None:
    split = rows.split_of([row(1), row(2, answer=1, prompt=2)], 4, soft=True)
    assert split.rows[1].input_ids == [0, 1, 200, 201] and split.rows[-1] == split.rows[1]
    assert split.rows[1].loss_weights == [0.0, 0.0, 1.0, 1.0]
    assert list(split.lengths) == [6, 4] and list(split.trained) == [3, 2] and list(split.sources) == [4, 4]
    assert split.labels is not None
    labels = split.labels(1)
    assert labels is not None and labels.ids.shape == (2, COLUMNS) and labels.ids[:, 0].tolist() == [200, 201]
    prompt = split.prompt(0)
    assert prompt is not None and prompt.expected == "answer 1"
    assert rows.split_of([row(1)], 0, soft=False).labels is None


def test_rows_of_a_study_stand_behind_those_of_files() -> None:
    own = PreparedData(split_of([3, 5]), split_of([4]), "a", "b", "c", ())
    both = rows.with_rows_of(own, [row(7)], 1, soft=True)
    assert list(both.train.lengths) == [3, 5, 6] and list(both.train.sources) == [0, 0, 1]
    assert both.train.rows[1] == own.train.rows[1] and both.train.rows[2].input_ids[-1] == 702
    assert both.train.labels is not None and both.train.labels(1) is None and both.train.labels(2) is not None
    assert list(both.eval.lengths) == [4] and both.train.wheres[2] == "rows.jsonl:1"


def test_other_labels_are_other_data() -> None:
    """A resumed run refuses rows that came out otherwise, and labels that did."""
    doubtful = row(1)
    doubtful.labels.logprobs[0, 0] = -0.5
    prints = {
        rows.with_rows_of(NO_ROWS, made, 0, soft).content_fingerprint
        for made, soft in (([row(1)], True), ([row(1)], False), ([doubtful], True), ([row(2)], True), ([row(1)], True))
    }
    assert len(prints) == 4


def test_an_export_is_measured_on_rows_of_its_study() -> None:
    data = rows.with_rows_of(NO_ROWS, [row(number) for number in range(5)], 0, soft=True)
    measured = rows.measured_on(data, 3)
    assert list(measured.eval.lengths) == [6] * 3 and measured.eval.rows[2].input_ids[-1] == 202
    assert len(measured.train.lengths) == 5
    own = PreparedData(data.train, split_of([4]), "", "", "", ())
    assert rows.measured_on(own, 3).eval is own.eval
