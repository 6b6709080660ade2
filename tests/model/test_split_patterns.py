"""Which patterns of a tokenizer are refused: those that repeat what is repeated, and none of a real tokenizer."""

from __future__ import annotations

import pytest

from qlora.export.gguf.pretokenizer import BYTES, KNOWN
from qlora.model.split_patterns import repeats_repeated

ENDLESS = [
    *("(a+)+", "(a*)*", "(a+){2,}", "((a+))+", r"(\w*\s?)*x", "(?:a+|b)*", "(a|b+)+?", "(?:(?:a+)b)*", r"([\]]+)+"),
    *(r"(\p{L}+)*", "(?i:a+)+", "(x[^)]*)+", "(a{5,})+", "(a{1,100}){1,100}", "(a+)+$", "((((a+))))*b", "(?<n>a+)+"),
    *(r"(\)+)+", "([(]+)+", "((a+){1}){9,}"),
]
FINE = [
    *("a+", "(a+)", "(a+)?", "(a+)(b+)", "(abc)+", r"[^\s(+*)]+", "(a?b)*", r"\(a+\)+", "([+*])+", "(a)+b+"),
    *(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))", "(?=(\\d{3})+(?!\\d))", "(a{2,4})+", "(a+){1}", "", ")", "(", "["),
    *("[[a-z]&&[^aeiou]]+", r"(\++", r"a{,}", r"(a{x}){2}", "'(?i:[sdmt]|ll|ve|re)", "{", "a{", "\\", r"\p{"),
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_refused(pattern: str) -> None:
    assert repeats_repeated(pattern)


@pytest.mark.parametrize("pattern", FINE)
def test_let_pass(pattern: str) -> None:
    assert not repeats_repeated(pattern)


def test_those_of_real_tokenizers_pass() -> None:
    patterns = {step for known in KNOWN for step in known.steps if step != BYTES}
    assert len(patterns) > 15 and not any(map(repeats_repeated, patterns))
