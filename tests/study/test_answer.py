"""Answers are read with the passage, without it and a second time, and their labels are what was written."""

from __future__ import annotations

import math

import numpy as np

from qlora.study.answer import Second, answer, answered_key
from qlora.study.ask import ask, tasks_of
from qlora.study.labels import labels_of
from qlora.study.records import Question
from tests.study.cases import Scripted, passage, tiny_teacher

KINDS = ("fact",)


def test_what_is_in_view_in_each_reading() -> None:
    teacher = Scripted()
    asked = ask(teacher, "chat", passage(), tasks_of(passage(), (), 3, KINDS, [0, 0, 0]), "0" * 32, 1)
    readings: tuple[tuple[Second, str], ...] = (
        ("sentence", passage().sentences[1]),
        ("other frame", passage().text),
    )
    for second, in_view in readings:
        teacher.answered.clear()
        answers, labels = answer(teacher, "chat", second, passage(), asked.questions)
        given, closed, again = (teacher.answered[at : at + 3] for at in (0, 3, 6))
        assert all(passage().text in text for text in given)
        assert closed == [question.text for question in asked.questions]
        assert in_view in again[1] and (passage().text in again[1]) == (second == "other frame")
        assert [one.text for one in answers] == ["7 years", "10 weeks", "water is missing"]
        assert [one.second_text for one in answers] == [one.text for one in answers]
        assert [key for key, _ in labels] == [question.key for question in asked.questions]
        assert all(math.isclose(one.gain, 3 - 0.125, abs_tol=1e-3) for one in answers)


def test_a_real_model_s_labels_are_its_probabilities() -> None:
    teacher = tiny_teacher()
    asked = [Question(f"{at:032x}", passage().key, at, "fact", "train", 1, f"Which number {at}?") for at in range(3)]
    answers, labels = answer(teacher, "chat", "sentence", passage(), asked)
    for one, (key, label) in zip(answers, labels, strict=True):
        assert key == one.question and tuple(label.token_ids[:-1]) == one.token_ids
        assert label.token_ids[-1] == teacher.chat.end_token_ids[0]
        own = label.logprobs[:-1, 0].astype(np.float64)
        assert math.isclose(math.exp(own.mean()), one.mean_probability, rel_tol=0.01)
        assert math.isclose(math.exp(own.min()), one.min_probability, rel_tol=0.01)


def test_the_end_is_certain_where_a_line_or_the_limit_ended_it() -> None:
    teacher = Scripted()
    written = teacher._written("7 years")
    end = teacher.chat.end_token_ids[0]
    assert labels_of(written, end).logprobs[-1, 0] == np.float16(-0.125)
    other = labels_of(written, 7)
    assert other.ids[-1, 0] == 7 and other.logprobs[-1, 0] == 0 and other.logprobs[-1, 1] == -np.inf
    assert len(other.ids) == len(other.token_ids) == len(written.token_ids) + 1


def test_the_key_follows_from_the_questions_and_how_they_are_read() -> None:
    asked = [Question("0" * 32, "p", 0, "fact", "train", 1, "What?")]
    keys = {
        answered_key("a", asked, "chat", "sentence", (1,)),
        answered_key("a", asked, "lines", "sentence", (1,)),
        answered_key("a", asked, "chat", "other frame", (1,)),
        answered_key("a", [], "chat", "sentence", (1,)),
        answered_key("a", asked, "chat", "sentence", (2,)),
    }
    assert len(keys) == 5
