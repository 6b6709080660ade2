"""When an answer is the one that was wanted, and how long it may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qlora.training.questions import EXTRA_TOKENS, Question, answer_tokens, same_answer, without_thoughts


def test_an_answer_is_compared_without_thoughts_case_or_forms_of_letters() -> None:
    assert same_answer("<think>hm</think> Zürich ", "zu\u0308rich") and not same_answer("Zurich", "Zürich")
    assert without_thoughts("<think>hm</think> It.").strip() == "It."


def test_an_answer_may_be_a_little_longer_than_the_longest() -> None:
    chat: Any = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, **_: list(text)))
    assert answer_tokens([], chat) == 0
    assert answer_tokens([Question([1], "?", "abc"), Question([1], "?", "a")], chat) == 3 + EXTRA_TOKENS
