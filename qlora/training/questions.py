"""Evaluation rows as questions: what is asked, and how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import PreparedSplit

EXTRA_TOKENS = 8  # exact match allows the longest expected answer and a little more


@dataclass(frozen=True)
class Question:
    """An evaluation row as a prompt and the answer it wants."""

    prompt_ids: list[int]
    asked: str
    expected: str


def questions_of(split: PreparedSplit, chat: ChatTokenizer, limit: int) -> list[Question]:
    """The first `limit` rows of a split that have a question and an answer."""
    found: list[Question] = []
    prompts = filter(None, map(split.prompt, range(len(split.lengths))))
    for messages, tools, expected, _ in islice(prompts, limit):
        asked = next((m["content"] for m in reversed(messages) if m.get("role") == "user"), "")
        found.append(Question(chat.prompt_ids(messages, tools), str(asked or ""), expected))
    return found


def answer_tokens(questions: Sequence[Question], chat: ChatTokenizer) -> int:
    """How long an answer to one of the questions may be for exact match; 0 without a question."""
    lengths = [len(chat.tokenizer.encode(q.expected, add_special_tokens=False)) for q in questions]
    return max(lengths) + EXTRA_TOKENS if lengths else 0
