"""Answering: greedily with the passage in view, the likeliest tokens kept; then without it, and read a second time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora.data.documents.chunks import PATH_SIGN, Passage
from qlora.study.generation import geometric_mean
from qlora.study.labels import Labels, labels_of
from qlora.study.prompts import FRAMES, Frame, Prompts, answer_in, prompts_for
from qlora.study.records import Answer, Key, Question, key_of
from qlora.study.teacher import Teacher

ANSWER_TOKENS = 96
EXTRA_TOKENS = 16  # that an answer without the passage may be longer than the one with it
# How an answer is read a second time: in the other frame, where the base reads well in both; else from its sentence.
Second = Literal["other frame", "sentence"]


@dataclass(frozen=True)
class Answered:
    """A line of answers.jsonl: what one passage's questions were answered. `key` is a hash of what it follows from."""

    key: Key
    passage: str
    answers: tuple[Answer, ...]


def answered_key(
    asked: str, questions: Sequence[Question], frame: Frame, second: Second, identity: Sequence[Any]
) -> str:
    """The key of `Answered`. `asked` is the key of the round of questions, `identity` what else it follows from."""
    said = [[question.key, question.text] for question in questions]
    return key_of("answered", asked, said, frame, second, ANSWER_TOKENS, *identity)


def answer(
    teacher: Teacher, frame: Frame, second: Second, passage: Passage, questions: Sequence[Question]
) -> tuple[list[Answer], list[tuple[str, Labels]]]:
    """Answers to a passage's questions and their labels. Raises RowError where a template cannot render a prompt."""
    if not questions:
        return [], []
    prompts, asked = prompts_for(passage.language), [question.text for question in questions]
    given = teacher.greedy(frame, [prompts.answer(frame, passage, text) for text in asked], ANSWER_TOKENS)
    closed = [prompts.closed(frame, text) for text in asked]
    longest = min(ANSWER_TOKENS, max(len(written.token_ids) for written in given) + EXTRA_TOKENS)
    alone = teacher.greedy(frame, closed, longest)
    scores = teacher.score(frame, closed, [written.token_ids for written in given])
    again = read_again(teacher, frame, second, passage, questions, longest)
    answers = [
        Answer(
            question.key,
            answer_in(teacher.text(written)),
            written.token_ids,
            written.ended,
            _share(written.mean_probability),
            _share(written.min_probability),
            answer_in(teacher.text(without)),
            _share(geometric_mean(score)),
            reading,
        )
        for question, written, without, score, reading in zip(questions, given, alone, scores, again, strict=True)
    ]
    end_id = teacher.chat.end_token_ids[0]
    labels = [(question.key, labels_of(written, end_id)) for question, written in zip(questions, given, strict=True)]
    return answers, labels


def read_again(
    teacher: Teacher, frame: Frame, second: Second, passage: Passage, questions: Sequence[Question], longest: int
) -> list[str]:
    """The questions' answers in a second reading of their passage."""
    prompts = prompts_for(passage.language)
    if second == "other frame":
        frame = next(other for other in FRAMES if other != frame)
        texts = [prompts.answer(frame, passage, question.text) for question in questions]
    else:
        texts = [
            prompts.answer_text(frame, _sentence(prompts, passage, question.sentence), question.text)
            for question in questions
        ]
    return [answer_in(teacher.text(written)) for written in teacher.greedy(frame, texts, longest)]


def _sentence(prompts: Prompts, passage: Passage, place: int) -> str:
    """A sentence alone under the path of its headings, shown as a passage is."""
    path = PATH_SIGN.join(passage.headings)
    sentence = passage.sentences[place]
    return prompts.shown(passage, f"{path}\n\n{sentence}" if path else sentence)


def _share(value: float) -> float:
    """A probability as it is written down: rounding may put it a hair above 1."""
    return min(1.0, max(0.0, round(value, 6)))
