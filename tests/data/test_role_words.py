"""Words for who speaks, of every export."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.role_words import plain_word, role_of, said_by


@pytest.mark.parametrize(
    ("word", "role"),
    [
        *[(word, "user") for word in ("user", "human", "Human", " HUMAN ", "User:", "prompter")],
        *[
            (word, "assistant")
            for word in ("assistant", "GPT", "chatgpt", "gpt-4", "bot", "model", "Bing", "bard", "AI")
        ],
        *[(word, "assistant") for word in ("Chatbot", "Claude", "AI Assistant")],
        *[(word, "system") for word in ("system", "SYSTEM", "developer")],
        *[(word, "call") for word in ("function_call", "Function Call", "tool-call", "tool_calls")],
        *[(word, "tool") for word in ("tool", "observation", "Observation", "function", "tool_response", "ipython")],
        *[(word, "tool") for word in ("function-response", "tool_result")],
        *[
            (word, None)
            for word in ("robot", "agent", "customer", "", " ", "x" * 10_000, None, 1, ["user"], {"role": 1})
        ],
    ],
)
def test_the_role_of_a_word(word: Any, role: str | None) -> None:
    assert role_of(word) == role


def test_capitals_blanks_and_dashes_make_no_difference() -> None:
    assert {plain_word(word) for word in ("System Prompt", "system-prompt", " SYSTEM_PROMPT: ")} == {"system_prompt"}


def test_whose_words_stand_under_a_key() -> None:
    assert [said_by(key) for key in ("Human", "question", "output", "assistant", "content", "score")] == [
        *("user", "user", "assistant", "assistant", None, None)
    ]
