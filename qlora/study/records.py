"""What a study writes down: a question, its answer, and the pair with its passage that the filters judge."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

# What a question is for. `train`: a row, if it is good. `exam`: about a sentence that is studied, by another prompt.
# `left_out`: about a sentence that is never studied, by the exam's prompt.
Purpose = Literal["train", "exam", "left_out"]

Key = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


@dataclass(frozen=True)
class Question:
    """A question that the base asked about a sentence. `key` names it in every later file."""

    key: Key
    passage: str  # Passage.key
    sentence: Count  # its place in Passage.sentences
    kind: str
    purpose: Purpose
    round: Count  # 2: asked again, because no question of the first round stood for its sentence
    text: str

    def dropped(self, answer: str | None, reason: str, detail: str) -> dict[str, Any]:
        """A line of dropped.jsonl. `detail` is the number, name or other question that gave the reason."""
        return {
            "key": self.key,
            "passage": self.passage,
            "sentence": self.sentence,
            "kind": self.kind,
            "purpose": self.purpose,
            "question": self.text,
            "answer": answer,
            "reason": reason,
            "detail": detail,
        }


@dataclass(frozen=True)
class Answer:
    """What the base answered, greedily, with the passage in view, and how sure it was.

    Probabilities are of the answer's own tokens, at temperature 1; of an empty answer they are 0.
    """

    question: Key  # Question.key
    text: str
    token_ids: tuple[int, ...]  # without what ended it
    ended: bool  # by itself, not by the limit
    mean_probability: Share  # geometric mean: exp of the mean log-probability
    min_probability: Share
    closed_text: str  # what it answers without the passage
    closed_mean_probability: Share  # of `token_ids` (not of closed_text), without the passage: geometric mean too
    second_text: str  # read a second time, in the other frame or from the sentence alone

    @property
    def gain(self) -> float:
        """Nats a token by which the passage makes the answer likelier."""
        floor = 1e-30
        return math.log(max(self.mean_probability, floor)) - math.log(max(self.closed_mean_probability, floor))


@dataclass(frozen=True)
class Candidate:
    """A question with its answer and its passage: what the filters judge."""

    question: Question
    answer: Answer
    passage: Passage


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits of a hash of plain values: what a record follows from."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
