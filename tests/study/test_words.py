"""Tokens that can be compared: numbers, units and number words, in five languages."""

from __future__ import annotations

import pytest

from qlora.study import words

SAME = [
    ("en", "7 years", "Seven years."),
    ("en", "twenty-four hours", "24 hours"),
    ("en", "€1,200.50", "1200.50 euros"),
    ("en", "7kW", "7 kW"),
    ("en", "−5 °C", "-5°C"),
    ("en", "20 percent", "20 %"),
    ("en", "Tarvell's pump", "the Tarvell pump"),
    ("de", "1.200,50 €", "1200,50 Euro"),
    ("de", "einundzwanzig Jahre", "21 Jahre"),
    ("de", "die Wärmepumpe", "eine Wärmepumpe"),
    ("fr", "l'appareil", "Appareil"),
    ("fr", "1 200 euros", "1200 €"),
    ("fr", "vingt et un ans", "21 ans"),
    ("es", "treinta y cuatro años", "34 años"),
    ("zh", "七年。", "7年"),
    ("zh", "４５摄氏度", "45 °C"),
]
OTHER = [
    ("en", "3.5", "35"),
    ("en", "3.10", "3.1"),
    ("en", "7 years", "7 months"),
    ("en", "€49", "$49"),
    ("en", "E41", "E 42"),
    ("en", "-5 °C", "5 °C"),
    ("en", "1,200", "1.200"),
    ("de", "1,5 kg", "15 kg"),
    ("zh", "七年", "八年"),
]


@pytest.mark.parametrize(("language", "one", "other"), SAME)
def test_the_same_said_otherwise(language: str, one: str, other: str) -> None:
    assert words.normalized(one, language) == words.normalized(other, language)


@pytest.mark.parametrize(("language", "one", "other"), OTHER)
def test_numbers_and_units_are_exact(language: str, one: str, other: str) -> None:
    assert words.normalized(one, language) != words.normalized(other, language)


def test_an_article_alone_stays() -> None:
    assert words.normalized("The", "en") == ["the"]


@pytest.mark.parametrize(
    ("text", "language", "is_one"),
    [
        ("I don't know.", "en", True),
        ("Sorry, that is not mentioned in the manual.", "en", True),
        ("Das weiß ich nicht.", "de", True),
        ("Je ne sais pas.", "fr", True),
        ("No lo sé.", "es", True),
        ("我不知道。", "zh", True),
        ("I don't know", "de", True),
        ("In 1987.", "en", False),
        ("It is unknowable whether anyone noticed.", "en", False),
    ],
)
def test_refusals_are_known_by_their_words(text: str, language: str, is_one: bool) -> None:
    assert words.refuses(text, language) is is_one


def test_jaccard_is_over_runs_of_characters() -> None:
    one, other = words.grams("What does it cost?"), words.grams("what does it  cost")
    assert words.jaccard(one, other) == 1 and words.jaccard(words.grams("abcdef"), words.grams("bcdefg")) == 1 / 3
    assert words.grams("ab") == {"ab"} and words.jaccard(frozenset(), frozenset()) == 0


def test_names_are_words_with_a_capital_inside_a_sentence() -> None:
    text = "How long is the warranty of Tarvell's TX200 in Berlin? The pump and an iPump."
    assert words.names(text, "en") == ["Tarvell", "TX200", "Berlin", "iPump"]
    assert words.names("Wie lange gilt die Garantie der WP7?", "de") == ["WP7"]


def test_length_is_words_or_characters() -> None:
    assert words.length("How long is 1.5 m?") == 5 and words.length("保修期是多久？") == 6


def test_a_code_of_a_language_may_have_a_region() -> None:
    assert words.words_of("de-AT").language == "de" and words.words_of("nl").language == "en"
    assert words.in_language("Hoe lang is de garantie?", "nl") and not words.in_language("How is it done?", "zh")
