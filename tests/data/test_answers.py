"""What is trained of a conversation under the shapes of this year's templates, against golden text files.

A line a stretch of text: `+` where it is trained; `-` between the rows that one conversation becomes; `!` what the
template left out, by kind.
`QLORA_WRITE_GOLDENS=1 pytest tests/data/test_answers.py` writes them anew; read the diff before you keep it.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.formats import Conversation
from qlora.data.row_json import RowError
from tests.data.shapes import SHAPES, TALKS, shape_chat
from tests.data.toys import encode_all

ANSWERS = Path(__file__).parent.parent / "golden" / "answers"


def shown(chat: ChatTokenizer, conversation: Conversation) -> str:
    before = chat.dropped.copy()
    try:
        rows = encode_all(chat, conversation)
    except RowError as error:
        return f"refused: {error.reason}\n"
    lines = []
    for number, row in enumerate(rows):
        lines += ["-"] if number else []
        pairs = zip(row.input_ids, row.loss_weights, strict=True)
        lines += [
            f"{'+' if weight else ' '} {chat.tokenizer.decode([token for token, _ in group])!r}"
            for weight, group in groupby(pairs, key=lambda pair: pair[1])
        ]
    lines += [f"! {kind}: {count}" for kind, count in sorted((chat.dropped - before).items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_the_golden_file(name: str) -> None:
    chat = shape_chat(name)
    text = "\n".join(f"== {case}\n{shown(chat, conversation)}" for case, conversation in TALKS.items())
    golden = ANSWERS / f"{name}.txt"
    if os.environ.get("QLORA_WRITE_GOLDENS"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
