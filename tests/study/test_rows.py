"""Rows of a study: shares, order, tokens with their labels, and conversations that any trainer reads."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qlora.data.conversations import conversations
from qlora.data.formats import Conversation
from qlora.data.prepare import NO_ROWS, PreparedData
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import SourceSection
from qlora.study import rows
from qlora.study.labels import COLUMNS, Labels, one_token
from qlora.study.rows import Shares, StudyRow
from tests.data.cases import split_of


def row(number: int, answer: int = 2, prompt: int = 3, lead: tuple[int, ...] = ()) -> StudyRow:
    tokens = range(100 * number, 100 * number + answer + 1)
    key = f"{number} {answer}"
    return StudyRow(f"Question {number}?", tuple(range(prompt)), f"answer {number}", tuple(tokens), key, lead)


def read(key: str, logprob: float = 0.0) -> Labels:
    """The labels of `row`s, as a store has them."""
    number, answer = map(int, key.split())
    tokens = np.arange(100 * number, 100 * number + answer + 1, dtype=np.int32)
    places = [one_token(int(token)) for token in tokens]
    logprobs = np.stack([logprobs for _, logprobs in places])
    logprobs[0, 0] = logprob
    return Labels(tokens, np.stack([ids for ids, _ in places]), logprobs)


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
    split = rows.split_of([row(1), row(2, answer=1, prompt=2)], 4, read)
    assert split.rows[1].input_ids == [0, 1, 200, 201] and split.rows[-1] == split.rows[1]
    assert split.rows[1].loss_weights == [0.0, 0.0, 1.0, 1.0]
    assert list(split.lengths) == [6, 4] and list(split.trained) == [3, 2] and list(split.sources) == [4, 4]
    assert split.labels is not None
    labels = split.labels(1)
    assert labels is not None and labels.ids.shape == (2, COLUMNS) and labels.ids[:, 0].tolist() == [200, 201]
    prompt = split.prompt(0)
    assert prompt is not None and prompt.expected == "answer 1"
    assert rows.split_of([row(1)], 0, None).labels is None


def test_what_the_template_writes_of_an_answer_is_trained_and_certain() -> None:
    split = rows.split_of([row(2, answer=1, prompt=2, lead=(7, 8))], 0, lambda key: read(key, -0.5))
    assert split.rows[0].input_ids == [0, 1, 7, 8, 200, 201] and split.trained[0] == 4
    assert split.rows[0].loss_weights == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0] and split.labels is not None
    labels = split.labels(0)
    assert labels is not None and labels.ids[:, 0].tolist() == [7, 8, 200, 201]
    assert labels.logprobs[:, 0].tolist() == [0.0, 0.0, -0.5, 0.0]


def test_labels_are_read_when_a_step_asks_for_them() -> None:
    """Of 300 rows of 50 tokens each they would be 5.8 MB; what is held of a row is its tokens and its key."""
    asked: list[str] = []

    def counted(key: str) -> Labels:
        asked.append(key)
        return read(key)

    made = [row(number, answer=49) for number in range(300)]
    tracemalloc.start()
    try:
        data = rows.with_rows_of(NO_ROWS, made, 0, counted)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000 and len(asked) == len(made)  # each once, for the fingerprint
    assert data.train.labels is not None and data.train.labels(17) is not None and asked[-1] == "17 49"


def test_rows_of_a_study_stand_behind_those_of_files() -> None:
    own = PreparedData(split_of([3, 5]), split_of([4]), "a", "b", "c", ())
    both = rows.with_rows_of(own, [row(7)], 1, read)
    assert list(both.train.lengths) == [3, 5, 6] and list(both.train.sources) == [0, 0, 1]
    assert both.train.rows[1] == own.train.rows[1] and both.train.rows[2].input_ids[-1] == 702
    assert both.train.labels is not None and both.train.labels(1) is None and both.train.labels(2) is not None
    assert list(both.eval.lengths) == [4] and both.train.wheres[2] == "rows.jsonl:1"


def test_other_labels_are_other_data() -> None:
    """A resumed run refuses rows that came out otherwise, and labels that did."""

    def doubtful(key: str) -> Labels:
        return read(key, -0.5)

    prints = {
        rows.with_rows_of(NO_ROWS, made, 0, how).content_fingerprint
        for made, how in (([row(1)], read), ([row(1)], None), ([row(1)], doubtful), ([row(2)], read), ([row(1)], read))
    }
    assert len(prints) == 4


def test_an_export_is_measured_on_rows_of_its_study(tmp_path: Path) -> None:
    documents = {"model": {"base": "a/b"}, "data": {"documents": [{"path": "manuals"}], "eval_fraction": 0.0}}
    recipe = Recipe.model_validate(documents)
    assert rows.as_exported(recipe, tmp_path) is recipe  # its rows are gone
    (tmp_path / "study").mkdir()
    rows.write(tmp_path / "study", [row(1)])
    (source,) = rows.as_exported(recipe, tmp_path).data.train
    assert source.path == str(tmp_path / "study" / "rows.jsonl")
    data = rows.with_rows_of(NO_ROWS, [row(number) for number in range(5)], 0, read)
    measured = rows.measured_on(recipe, data)
    assert list(measured.eval.lengths) == [6] * 5 and measured.eval.rows[2].input_ids[-1] == 202
    own = PreparedData(data.train, split_of([4]), "", "", "", ())
    assert rows.measured_on(recipe, own).eval is own.eval
    plain = Recipe.model_validate({"model": {"base": "a/b"}, "data": {"train": [{"path": "x.jsonl"}]}})
    assert rows.measured_on(plain, data) is data and rows.as_exported(plain, tmp_path) is plain
