"""The sparse index against the formula written out, and what is found in five languages."""

from __future__ import annotations

import math
import random

import pytest

from qlora.study import bm25
from tests.study.passages import BOILER, CODES, PASSAGES, PUMP, passage


def plain_score(query: list[str], documents: list[list[str]], at: int) -> float:
    mean = sum(map(len, documents)) / len(documents)
    total = 0.0
    for term in query:
        holding = sum(term in document for document in documents)
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        tf = documents[at].count(term)
        total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(documents[at]) / mean))
    return total


def test_scores_are_those_of_the_formula() -> None:
    draw = random.Random(1)
    vocabulary = [f"word{chr(97 + at)}" for at in range(20)]
    documents = [draw.choices(vocabulary, k=draw.randint(1, 30)) for _ in range(40)]
    index = bm25.Index((" ".join(document), "en") for document in documents)
    for _ in range(20):
        query = draw.choices([*vocabulary, "absent"], k=draw.randint(1, 6))
        expected = [plain_score(query, documents, at) for at in range(40)]
        assert index.scores(" ".join(query), "en").tolist() == pytest.approx(expected, rel=1e-5)
        ranked = sorted((at for at in range(40) if expected[at] > 0), key=lambda at: (-round(expected[at], 4), at))
        found = index.best(" ".join(query), "en", 5)
        assert [round(expected[at], 4) for at in found] == [round(expected[at], 4) for at in ranked[:5]]


def test_equal_passages_are_found_in_order_and_a_stranger_finds_none() -> None:
    index = bm25.Index([("red pump", "en")] * 7)
    assert index.best("red", "en", 3) == [0, 1, 2]
    assert index.best("green", "en", 3) == [] and index.best("", "en", 3) == []
    assert bm25.Index([]).best("red", "en", 3) == []


def test_words_that_say_nothing_find_nothing() -> None:
    index = bm25.Index([("it is what it does", "en"), ("pump", "en")])
    assert index.best("what does it do with the pump", "en", 3) == [1]


def test_chinese_is_found_by_pairs_of_characters() -> None:
    assert bm25.terms("热泵RB7的保修期。漏", "zh") == ["热泵", "rb7", "的保", "保修", "修期", "漏"]
    texts = ["热泵的保修期为七年", "锅炉的水箱容量", "配送的费用"]
    index = bm25.Index((text, "zh") for text in texts)
    assert [index.best(query, "zh", 1) for query in ("保修多久", "水箱多大", "配送要多少钱")] == [[0], [1], [2]]


def test_passages_that_say_the_same_are_shown_once() -> None:
    search = bm25.Search([PUMP, passage("A sack of coal."), PUMP, *PASSAGES])
    found = search.best("warranty of the TX200", "en", 3)
    assert found[0] == PUMP and len(found) == len({p.key for p in found}) == 3
    assert {BOILER, CODES} >= set(found[1:])


def test_memory_is_of_what_stands_in_the_passages() -> None:
    """10,000 passages of 20 words from 20,000: a full table would have 800 MB."""
    draw = random.Random(2)
    index = bm25.Index((" ".join(f"w{draw.randrange(20_000)}" for _ in range(20)), "en") for _ in range(10_000))
    assert index._places_P.nbytes + index._weights_P.nbytes <= 8 * 200_000
