"""How long an answer may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qlora.training.questions import EXTRA_TOKENS, Question, answer_tokens


def test_an_answer_may_be_a_little_longer_than_the_longest() -> None:
    chat: Any = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, **_: list(text)))
    assert answer_tokens([], chat) == 0
    assert answer_tokens([Question([1], "?", "abc"), Question([1], "?", "a")], chat) == 3 + EXTRA_TOKENS
