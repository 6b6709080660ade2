"""Thoughts are told from words, however the marks are cut into pieces."""

from __future__ import annotations

import pytest

from qlora.ask.thoughts import Thoughts, as_message, opened_block
from tests.ask.cases import ToyLlama, toy_model, user
from tests.families import CHATML

THINK = ("<think>", "</think>")


def split(text: str, size: int, block: tuple[str, str] | None = None) -> list[tuple[str, bool]]:
    """Parts of a text that comes in pieces of a size, neighbours of one kind joined."""
    thoughts = Thoughts(block)
    parts = [part for at in range(0, len(text), size) for part in thoughts.take(text[at : at + size])]
    joined: list[tuple[str, bool]] = []
    for part, dim in [*parts, *thoughts.rest()]:
        if joined and joined[-1][1] == dim:
            joined[-1] = (joined[-1][0] + part, dim)
        else:
            joined.append((part, dim))
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_the_same_parts_in_pieces_of_any_size(size: int) -> None:
    text = "Hm <b>. <think>so [THINK] it</think>yes<thi"
    assert split(text, size) == [("Hm <b>. ", False), ("<think>so [THINK] it</think>", True), ("yes<thi", False)]
    assert split("so</think>yes", size, THINK) == [("so</think>", True), ("yes", False)]
    assert split("never closed", size, THINK) == [("never closed", True)]


def test_a_prompt_that_opens_thoughts_is_seen_and_kept_in_the_row() -> None:
    model = toy_model(ToyLlama(template=CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")))
    assert opened_block(model, model.chat.prompt_ids([user("hi")], None)) == THINK
    plain = toy_model()
    assert opened_block(plain, plain.chat.prompt_ids([user("hi")], None)) is None
    assert as_message("so</think>yes", THINK) == "<think>\nso</think>yes"
    assert as_message("cut", THINK) == "cut" and as_message("x</think>", None) == "x</think>"
