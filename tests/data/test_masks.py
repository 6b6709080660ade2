"""Masks against golden text files: six families of templates, every token shown, trained ones marked with a plus.

`QLORA_WRITE_GOLDENS=1 pytest tests/data/test_masks.py` writes them anew; read the diff before you keep it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.row_json import RowError
from qlora.events import Recorder
from tests.data.toys import CASES, FAMILIES, Case, encode, family_tokenizer

MASKS = Path(__file__).parent.parent / "golden" / "masks"


def shown(chat: ChatTokenizer, case: Case) -> str:
    """One line a token: `+` where it is trained; or the reason why the row is refused."""
    try:
        row = encode(chat, case.make())
    except RowError as error:
        return f"refused: {error.reason}\n"
    return "".join(f"{'+' if weight else ' '} {token!r}\n" for token, weight in tokens_of(chat, row))


def tokens_of(chat: ChatTokenizer, row: TokenRow) -> list[tuple[str, float]]:
    texts = [chat.tokenizer.decode([token]) for token in row.input_ids]
    return list(zip(texts, row.loss_weights, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_golden_file(family: str) -> None:
    chat = ChatTokenizer(family_tokenizer(family), "assistant", Recorder())
    text = "\n".join(f"== {case.name}\n{shown(chat, case)}" for case in CASES)
    golden = MASKS / f"{family}.txt"
    if os.environ.get("QLORA_WRITE_GOLDENS"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_marks_and_rendered_prefixes_agree(family: str, case: Case) -> None:
    marked = ChatTokenizer(family_tokenizer(family, marks=True), "assistant", Recorder())
    unmarked = ChatTokenizer(family_tokenizer(family, marks=False), "assistant", Recorder())
    assert marked.template != unmarked.template
    assert shown(marked, case) == shown(unmarked, case)
