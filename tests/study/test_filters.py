"""Each filter catches what it is for and lets good questions through; what is dropped says why."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qlora.data.documents.chunks import Passage
from qlora.study import filters
from qlora.study.records import Candidate
from tests.study.passages import BOILER, CODES, PASSAGES, PRICES, PUMP, candidate, passage

GOOD = [
    candidate(PUMP, 0, "How long is the warranty of the Tarvell TX200?", "seven years"),
    candidate(PUMP, 0, "From which day does the warranty of the Tarvell TX200 heat pump count?", "the day of purchase"),
    candidate(PUMP, 1, "What is the weight of the outdoor unit of the TX200?", "84 kg"),
    candidate(PUMP, 1, "Which fuse does the TX200's outdoor unit need?", "16 A"),
    candidate(PUMP, 2, "Which refrigerant is in the Tarvell TX200?", "Propane"),
    candidate(PUMP, 2, "How much propane does the filling of the TX200 hold?", "1.2 kg"),
    candidate(PUMP, 3, "Who is allowed to do the maintenance of the Tarvell TX200?", "a certified technician"),
    candidate(PUMP, 3, "How often is maintenance of the TX200 heat pump due?", "Every 24 months."),
    candidate(CODES, 0, "What does error code E41 mean on a TX200?", "The water pressure is below 0.8 bar."),
    candidate(CODES, 0, "Below which water pressure is E41 shown?", "0.8 bar"),
    candidate(CODES, 1, "What does error code E52 mean on a TX200?", "The outdoor fan is blocked by ice."),
    candidate(CODES, 2, "How do I clear an error on the TX200?", "Hold the button marked OK for five seconds."),
    candidate(CODES, 2, "Which button clears an error?", "OK"),
    candidate(PRICES, 0, "How much is a filter set?", "€49.90"),
    candidate(PRICES, 0, "What does a new fan motor cost?", "310 €"),
    candidate(PRICES, 1, "From what order value is delivery free of charge?", "above €500"),
    candidate(PRICES, 1, "How fast are free orders delivered?", "within three working days"),
    candidate(
        PRICES, 2, "Anna sends back a part in its unopened box: when is it refunded?", "Within 14 days", kind="case"
    ),
    candidate(BOILER, 0, "How long is the warranty of the Norvik B9?", "two years"),
    candidate(BOILER, 1, "How many litres does the tank of the Norvik B9 hold?", "120 litres"),
    candidate(BOILER, 2, "What is used for descaling the Norvik B9 boiler?", "citric acid"),
    candidate(BOILER, 2, "Every how many months is descaling of the B9 due?", "12"),
]

# 36 planted rows: what is wrong with each, and how it is meant to be dropped.
PLANTED: list[tuple[str, Candidate]] = [
    ("form", candidate(PUMP, 0, "Tell me about the warranty of the TX200.", "seven years")),
    ("form", candidate(PUMP, 0, "What is\nthe warranty of the TX200?", "seven years")),
    ("form", candidate(PUMP, 1, "How heavy?", "84 kg")),
    ("form", candidate(PUMP, 1, f"What is the weight of the {'very ' * 40} heavy unit of the TX200?", "84 kg")),
    ("form", candidate(PUMP, 1, "", "84 kg")),
    ("form", candidate(PUMP, 1, "What is the weight of the outdoor unit? It weighs 84 kg", "84 kg")),
    ("language", candidate(PUMP, 0, "Wie lange gilt die Garantie der Wärmepumpe TX200?", "seven years")),
    ("language", candidate(PUMP, 0, "¿Cuánto dura la garantía de la bomba de calor TX200?", "seven years")),
    ("language", candidate(PUMP, 0, "TX200的保修期是多长时间？", "seven years")),
    ("self reference", candidate(PUMP, 0, "What warranty does this section give for the TX200?", "seven years")),
    ("self reference", candidate(PUMP, 2, "According to the text, which refrigerant is in the TX200?", "propane")),
    (
        "self reference",
        candidate(CODES, 0, "What does the code mentioned above mean on a TX200?", "pressure below 0.8 bar"),
    ),
    ("foreign name", candidate(PUMP, 1, "How much does the outdoor unit of the Kestrel K4 weigh?", "84 kg")),
    ("foreign name", candidate(CODES, 0, "What does error code E77 mean on a TX200?", "The outdoor fan is blocked")),
    (
        "ambiguous",
        candidate(passage("It is red and it shines.\nIt weighs 3 kg."), 0, "Which colour does it have today?", "red"),
    ),
    (
        "ambiguous",
        candidate(
            passage("It is blue and it is quiet."),
            0,
            "How many seconds is the button pressed to clear an error code?",
            "blue",
        ),
    ),
    (
        "no answer",
        candidate(PUMP, 2, "What is the boiling point of the refrigerant in the TX200?", "The text does not say."),
    ),
    ("no answer", candidate(PUMP, 2, "What colour has the refrigerant in the TX200?", "Not specified in the passage")),
    ("no answer", candidate(PUMP, 2, "Which smell has the refrigerant in the TX200?", " … ")),
    (
        "cut",
        candidate(
            PUMP,
            3,
            "What maintenance does the TX200 need?",
            "Maintenance by a certified technician is due",
            ended=False,
        ),
    ),
    (
        "ungrounded",
        candidate(
            PUMP, 3, "Which upkeep does the TX200 need?", "Maintenance by a certified technician is due every 36 months"
        ),
    ),
    ("ungrounded", candidate(PUMP, 1, "What does the outdoor unit of the TX200 weigh?", "84.5 kg")),
    ("ungrounded", candidate(PUMP, 2, "Which gas is the refrigerant of the TX200?", "It is the gas R290")),
    ("ungrounded", candidate(PUMP, 3, "Who does maintenance of the TX200?", "a certified technician of Bosch")),
    ("ungrounded", candidate(CODES, 1, "Why is E52 shown on the TX200?", "because leaves and twigs cover everything")),
    ("ungrounded", candidate(PRICES, 0, "What is the price of a filter set?", "$49.90")),
    (
        "round trip",
        candidate(PUMP, 1, "Which fuse must the outdoor unit of the TX200 have?", "16 A", second_text="84 A"),
    ),
    (
        "round trip",
        candidate(
            PUMP, 0, "Since when does the TX200's warranty count?", "the day of purchase", second_text="seven years"
        ),
    ),
    (
        "round trip",
        candidate(CODES, 2, "What clears an error of the TX200?", "hold the button for five seconds", second_text=""),
    ),
    (
        "round trip",
        candidate(
            BOILER, 1, "How much does the tank of the B9 hold?", "120 litres", second_text="120 litres in 45 minutes"
        ),
    ),
    ("unsure", candidate(BOILER, 1, "How fast does the Norvik B9 heat up?", "45 minutes", mean_probability=0.49)),
    ("unsure", candidate(PRICES, 2, "When are returned parts refunded?", "within 14 days", mean_probability=0.0)),
    (
        "no gain",
        candidate(
            BOILER, 2, "When must the Norvik B9 be descaled again?", "every 12 months", closed_mean_probability=0.8
        ),
    ),
    ("twice", candidate(PUMP, 0, "How long is the warranty of the Tarvell TX200 ?", "seven years")),
    (
        "twice",
        candidate(
            CODES, 2, "How do I clear an error on the TX200, please?", "Hold the button marked OK for five seconds."
        ),
    ),
    ("twice", candidate(BOILER, 1, "How many litres does the tank of Norvik B9 hold?", "120 litres")),
]
ALL = [*PASSAGES, *(c.passage for _, c in PLANTED if c.passage not in PASSAGES)]


def test_each_filter_catches_its_kind_and_good_questions_stay() -> None:
    assert len(PLANTED) == 36
    judged = filters.judge([*GOOD, *(bad for _, bad in PLANTED)], ALL, sure=0.5)
    found = {lost.question.key: lost.reason for lost in judged.dropped}
    assert {bad.question.text: found.get(bad.question.key) for _, bad in PLANTED} == {
        bad.question.text: reason for reason, bad in PLANTED
    }
    lost = [good.question.text for good in GOOD if good.question.key in found]
    assert len(lost) <= 0.05 * len(GOOD), lost
    assert Counter(reason for reason, _ in PLANTED).keys() == set(filters.SAID)
    assert len(judged.kept) + len(judged.dropped) == len(GOOD) + len(PLANTED)


OTHERS = [
    (
        passage("Die Wärmepumpe WP7 hat eine Garantie von sieben Jahren.", "Wärmepumpe WP7", language="de"),
        "Wie lange gilt die Garantie der Wärmepumpe WP7?",
        "7 Jahre",
        "Was steht in diesem Abschnitt über die WP7?",
    ),
    (
        passage("La pompe à chaleur PC7 a une garantie de sept ans.", "Pompe PC7", language="fr"),
        "Quelle est la durée de la garantie de la pompe PC7 ?",
        "7 ans",
        "Que dit ce passage sur la garantie de la PC7 ?",
    ),
    (
        passage("La bomba de calor BC7 tiene una garantía de siete años.", "Bomba BC7", language="es"),
        "¿Cuánto dura la garantía de la bomba BC7?",
        "7 años",
        "¿Qué dice este texto sobre la garantía de la bomba BC7?",
    ),
    (
        passage("热泵RB7的保修期为七年。", "热泵RB7", language="zh"),
        "热泵RB7的保修期是多久？",
        "7年",
        "这段文字中热泵RB7的保修期是多久？",
    ),
]


@pytest.mark.parametrize(
    ("where", "asked", "answer", "referring"), OTHERS, ids=lambda value: getattr(value, "language", "")
)
def test_other_languages_are_judged_by_their_own_words(where: Passage, asked: str, answer: str, referring: str) -> None:
    passages = [p for p, *_ in OTHERS]
    good, bad = candidate(where, 0, asked, answer), candidate(where, 0, referring, answer)
    english = candidate(where, 0, "How long is the warranty of the heat pump?", answer)
    wrong = candidate(where, 0, asked, answer.replace("7", "8"), second_text=answer.replace("7", "8"))
    assert [c.question.text for c in filters.judge([good], passages, 0.5).kept] == [asked]
    reasons = [filters.judge([one], passages, 0.5).dropped[0].reason for one in (bad, english, wrong)]
    assert reasons == ["self reference", "language", "ungrounded"]


def test_a_question_that_means_two_passages_gets_the_path_of_its_section() -> None:
    asked = "How long is the warranty from the day of purchase?"
    both = [candidate(PUMP, 0, asked, "seven years"), candidate(BOILER, 0, asked, "two years")]
    judged = filters.judge(both, PASSAGES, sure=0.5)
    assert [c.question.text for c in judged.kept] == [f"Tarvell TX200, Data: {asked}", f"Norvik B9, Data: {asked}"]
    # Judged again, as a study that goes on does, nothing more is put in front.
    assert filters.judge(judged.kept, PASSAGES, sure=0.5).kept == judged.kept


def test_what_the_base_knows_is_kept_and_named() -> None:
    knows = candidate(
        BOILER,
        2,
        "What is used for descaling the Norvik B9 boiler?",
        "citric acid",
        closed_text="You use citric acid.",
        closed_mean_probability=0.9,
    )
    judged = filters.judge([knows, GOOD[0]], PASSAGES, sure=0.5)
    assert judged.known == {knows.question.key} and len(judged.kept) == 2


def test_questions_that_differ_in_a_number_or_a_name_are_two() -> None:
    asked = [f"Below which pressure in bar does the display of the TX200 show the error code E{n}?" for n in (41, 52)]
    pair = [candidate(CODES, at, text, "0.8 bar") for at, text in enumerate(asked)]
    assert len(filters.judge(pair, PASSAGES, sure=0.5).kept) == 2


def test_what_is_dropped_is_counted_and_written_down() -> None:
    judged = filters.judge([bad for _, bad in PLANTED], ALL, sure=0.5)
    notices = filters.notices(judged.dropped)
    assert sum(notice.count or 0 for notice in notices) == len(judged.dropped)
    assert [n.count for n in notices] == sorted((n.count or 0 for n in notices), reverse=True)
    line = json.loads(json.dumps(judged.dropped[0].record()))
    assert line["reason"] == "form" and line["question"] and line["answer"] == "seven years"


def test_coverage_counts_training_questions_by_sentence() -> None:
    exam = candidate(CODES, 1, "Why does E52 appear on the display?", "ice", purpose="exam")
    judged = filters.judge([*GOOD, exam], PASSAGES, sure=0.5)
    without = [c for c in judged.kept if c.question.passage != BOILER.key]
    found = filters.coverage([*PASSAGES, PUMP], without)
    assert (found["sentences"], found["with_question"]) == (13, 10)
    by_key = {entry["key"]: entry for entry in found["passages"]}
    assert by_key[PUMP.key]["questions"] == [2, 2, 2, 2] and by_key[BOILER.key]["without"] == list(BOILER.sentences)


def test_questions_are_judged_before_they_are_answered() -> None:
    kept, dropped = filters.judge_questions([(c.question, c.passage) for c in [*GOOD, PLANTED[0][1]]], PASSAGES)
    assert len(kept) == len(GOOD) and [lost.reason for lost in dropped] == ["form"] and dropped[0].answer is None
