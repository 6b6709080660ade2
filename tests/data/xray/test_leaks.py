"""What training has of evaluation rows: the row, its question, its answer, its answer in a text."""

from __future__ import annotations

from pathlib import Path

from qlora.data.xray import leaks, tokens
from tests.data.xray.cases import chat, pair, prepared, section, sentence, write


def test_each_kind_is_told_apart(tmp_path: Path) -> None:
    long = sentence(3)
    train = [pair("One?", "The first."), pair("Two?", "The second."), pair("Text?", f"It says: {long} and so on.")]
    asked = [
        pair("One?", "The first."),  # the row
        pair("Two?", "Another."),  # its question
        pair("And in other words?", "The second."),  # its answer
        pair("What does it say?", long),  # its answer, within a text
        pair("New?", "Nothing of it."),
        pair("Newer?", sentence(8)),
    ]
    paths = [write(tmp_path / "t.jsonl", train)], [write(tmp_path / "e.jsonl", asked)]
    made, ids = prepared(tmp_path, section(*paths)), tokens.Ids.of(chat())
    (facts, answers), (asked_facts, _) = tokens.look(made.train, ids), tokens.look(made.eval, ids)
    found = leaks.find(made.train, made.eval, (facts, asked_facts), answers)
    assert found == leaks.Leaks(rows=(0,), questions=(0, 1), answers=(0, 2), inside=(3,))
