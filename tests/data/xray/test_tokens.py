"""What each row trains, begins and ends with."""

from __future__ import annotations

from pathlib import Path

import numpy

from qlora.data.xray import tokens
from tests.data.xray.cases import chat, pair, prepared, section, write


def test_answers_of_several_turns_are_told_apart(tmp_path: Path) -> None:
    talk = {"messages": [*pair("One?", "Yes.")["messages"], *pair("Two?", "No, never.")["messages"]]}
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", [talk, pair("Three?", "Yes.")])])).train
    facts, answers = tokens.look(split, tokens.Ids.of(chat()))
    assert facts.ended.all() and len(answers) == 2  # Yes. twice, No, never. once
    decode = chat().tokenizer.decode
    last = [decode(split.rows[row].input_ids[facts.starts[row] : facts.stops[row]]) for row in (0, 1)]
    assert last == ["No, never.", "Yes."]
    assert decode(split.rows[1].input_ids[: facts.starts[1]]).endswith("assistant\n")
    assert facts.answers[1] in answers and facts.answers[0] != facts.answers[1]


def test_bos_is_counted_at_the_beginning(tmp_path: Path) -> None:
    using = chat("llama3")
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", [pair("One?", "Yes.")])]), using).train
    facts, _ = tokens.look(split, tokens.Ids.of(using))
    assert facts.bos.tolist() == [1]


def test_a_copy_is_a_copy_of_the_first() -> None:
    again, original = tokens.copies(numpy.array([5, 7, 5, 0, 0, 5], numpy.uint64))
    assert again.tolist() == [2, 5] and original.tolist() == [0, 0]
