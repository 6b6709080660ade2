"""The exam is decided first, by hashes; nothing that is learnt gives it away."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qlora.study import split, words
from qlora.study.filters import Judged
from qlora.study.records import Candidate
from tests.study.passages import EXAM, PASSAGES, PUMP, ROWS, candidate, passage


def texts(rows: list[Candidate]) -> list[str]:
    return [row.question.text for row in rows]


def test_an_exam_question_is_about_a_fact_that_is_learnt_and_near_ones_leave() -> None:
    found = split.split(Judged([*ROWS, *EXAM], [], frozenset()), 10, seed=0)
    # No row is about maintenance, and none of E41's rows answers with the code.
    assert set(texts(found.exam)) == set(texts([EXAM[0], EXAM[1], EXAM[2], EXAM[5]]))
    assert texts(found.train) == texts(ROWS[1:])
    assert [(leak.candidate, leak.exam) for leak in found.leaks] == [(ROWS[0], EXAM[0].question.key)]
    assert found.leaks[0].record()["reason"] == "near an exam question"
    assert not split.near_pairs(found.train, found.exam)


def test_near_pairs_are_those_of_a_plain_count() -> None:
    draw = random.Random(0)
    vocabulary = ["how", "long", "does", "the", "pump", "run", "until", "a", "filter", "of", "it", "is", "full"]
    asked = [draw.choices(vocabulary, k=8) for _ in range(10)]
    for _ in range(50):  # one or two words of an earlier one are others
        asked.append([draw.choice(vocabulary) if draw.random() < 0.2 else word for word in draw.choice(asked)])
    draw.shuffle(asked)
    rows = [candidate(PUMP, 0, " ".join(said) + "?", "84 kg") for said in asked]
    train, exam = rows[:40], rows[40:]
    plain = [
        (at, place)
        for at, one in enumerate(train)
        for place, other in enumerate(exam)
        if words.jaccard(words.grams(one.question.text), words.grams(other.question.text)) >= 0.5
    ]
    assert plain and split.near_pairs(train, exam) == plain


def test_a_fact_whose_only_row_is_near_is_not_examined() -> None:
    found = split.split(Judged([ROWS[0], EXAM[0]], [], frozenset()), 10, seed=0)
    assert texts(found.train) == texts([ROWS[0]]) and not found.exam


def test_what_the_base_knows_is_held_and_not_examined() -> None:
    known = frozenset({ROWS[3].question.key, EXAM[2].question.key})
    found = split.split(Judged([*ROWS, *EXAM], [], known), 10, seed=0)
    assert texts(found.hold) == texts([ROWS[3]]) and ROWS[3] not in found.train and EXAM[2] not in found.exam


def test_the_same_seed_decides_the_same_in_any_order() -> None:
    chosen = [
        {tuple(texts(split.split(Judged(list(order), [], frozenset()), 2, seed).exam)) for order in (rows, rows[::-1])}
        for seed in range(6)
        for rows in [[*ROWS, *EXAM]]
    ]
    assert all(len(one) == 1 for one in chosen) and len(set.union(*chosen)) > 1


def test_left_out_follows_from_the_sentence_alone() -> None:
    many = [passage("\n".join(f"Part {n} of shelf {shelf} costs {n * shelf} euros." for n in range(40)), f"S{shelf}")
            for shelf in range(1, 11)]  # fmt: skip
    before = split.left_out(many, 0.05, seed=1)
    assert 0.02 * 400 < len(before) < 0.09 * 400
    edited = replace(many[0], sentences=("Another first line.", *many[0].sentences[1:]), text="edited")
    after = split.left_out([edited, *many[1:]], 0.05, seed=1)

    def said(found: frozenset[tuple[str, int]], passages: list) -> set[str]:  # type: ignore[type-arg]
        by_key = {p.key: p for p in passages}
        return {by_key[key].sentences[at] for key, at in found}

    assert said(before, many) - {many[0].sentences[0]} == said(after, [edited, *many[1:]]) - {"Another first line."}
    assert split.left_out(many, 0.05, seed=2) != before and split.left_out(many, 0.0, seed=1) == frozenset()
    assert len(split.left_out(PASSAGES, 1e-9, seed=1)) == 1


def test_a_row_that_tells_a_left_out_sentence_is_not_learnt() -> None:
    hidden = candidate(PUMP, 1, "What does the unit of the TX200 weigh?", "84 kg", purpose="left_out")
    tells = candidate(PUMP, 2, "What is there to know of the TX200?", "Its outdoor unit weighs 84 kg.")
    found = split.split(Judged([*ROWS, tells, hidden], [], frozenset()), 0, seed=0)
    assert texts(found.left_out) == texts([hidden]) and tells not in found.train
    assert [leak.reason for leak in found.leaks] == ["tells a sentence that is left out"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_more_questions_than_asked_for_and_a_sentence_once_before_twice(count: int) -> None:
    again = [replace(row, question=replace(row.question, key=f"again{at}", text=f"Now tell me, {row.question.text}"))
             for at, row in enumerate(EXAM)]  # fmt: skip
    found = split.split(Judged([*ROWS, *EXAM, *again], [], frozenset()), count, seed=0)
    sentences = [(row.question.passage, row.question.sentence) for row in found.exam]
    assert len(sentences) == count == len(set(sentences))
