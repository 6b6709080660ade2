"""Measuring on the evaluation rows: loss, exact match of greedy answers, samples beside the untuned base's.

Nothing here touches what the next training step depends on: modules go back to the mode they were in, random numbers
are not drawn, gradients are off. A run with evaluation therefore equals one without, bit for bit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora.data.chat import ChatTokenizer
from qlora.data.loader import collate, eval_packs
from qlora.data.prepare import PreparedSplit
from qlora.events import Progress, Sink
from qlora.model import generate
from qlora.model.adapters import without_adapters
from qlora.recipe.sections import DataSection
from qlora.step.forward import CausalParts, batch_loss, evaluating

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
SAMPLE_TOKENS = 128  # longest sample answer; exact match allows the longest expected answer and a little more
EXTRA_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """An evaluation row as a prompt and the answer it wants."""

    prompt_ids: list[int]
    asked: str
    expected: str


@dataclass(frozen=True)
class Evaluator:
    """What evaluation needs of a run."""

    model: Any
    parts: CausalParts
    chat: ChatTokenizer
    split: PreparedSplit
    data: DataSection
    pad_id: int
    device: torch.device
    sink: Sink
    micro_batch_size: int
    answers_at_once: int = generate.ANSWERS_AT_ONCE
    check_stop: Callable[[], None] = lambda: None  # raises when it is time to leave

    def try_longest(self) -> None:
        """One micro-batch of the longest rows, for what it takes in memory."""
        packs = eval_packs(self.split, self.data)[: self.micro_batch_size]
        with evaluating(self.model):
            batch_loss(self.parts, collate(self.split, packs, self.pad_id, self.data.max_length).to(self.device))

    def loss(self) -> float:
        """Mean loss in nats per trained token over all evaluation rows."""
        packs = eval_packs(self.split, self.data)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        weight = 0.0
        with evaluating(self.model):
            for start in range(0, len(packs), self.micro_batch_size):
                self.check_stop()
                chosen = packs[start : start + self.micro_batch_size]
                batch = collate(self.split, chosen, self.pad_id, self.data.max_length)
                weight += float(batch.loss_weights_BS.sum())
                total += batch_loss(self.parts, batch.to(self.device)).double()
                self.sink.emit(Progress("evaluate", min(start + len(chosen), len(packs)), len(packs)))
        return float(total) / weight if weight else float("nan")

    def questions(self, limit: int) -> list[Question]:
        """The first `limit` evaluation rows that have a question and an answer."""
        return questions_of(self.split, self.chat, limit)

    def answers(self, questions: Sequence[Question], untuned: bool = False, limit: int | None = None) -> list[str]:
        """Greedy answers as text, of the tuned model or of the base under it."""
        tokenizer = self.chat.tokenizer
        longest = max((len(tokenizer.encode(q.expected, add_special_tokens=False)) for q in questions), default=0)
        count = longest + EXTRA_TOKENS
        with evaluating(self.model), without_adapters(self.model) if untuned else nullcontext():
            produced = generate.greedy(
                self.model,
                [q.prompt_ids for q in questions],
                self.chat.end_token_ids,
                min(count, limit) if limit else count,
                self.pad_id,
                batch_size=self.answers_at_once,
                check_stop=self.check_stop,
            )
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in produced]

    def exact_match(self, questions: Sequence[Question]) -> float:
        """Share of questions answered exactly."""
        answers = self.answers(questions)
        return sum(same_answer(a, q.expected) for a, q in zip(answers, questions, strict=True)) / len(questions)


def questions_of(split: PreparedSplit, chat: ChatTokenizer, limit: int) -> list[Question]:
    """The first `limit` rows of a split that have a question and an answer."""
    found: list[Question] = []
    for index in range(len(split.lengths)):
        if len(found) == limit:
            break
        if (prompt := split.prompt(index)) is not None:
            messages, tools, expected = prompt
            ids = chat.prompt_ids(messages, tools)
            asked = next((m["content"] for m in reversed(messages) if m.get("role") == "user"), "")
            found.append(Question(ids, str(asked or ""), expected))
    return found


def same_answer(given: str, expected: str) -> bool:
    """Equal after NFC, strip and casefold; a leading block of reasoning is not part of an answer."""
    return _normal(given) == _normal(expected)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", _THINKING.sub("", text)).strip().casefold()
