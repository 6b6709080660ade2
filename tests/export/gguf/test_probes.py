"""The texts that two tokenizers are compared by, and what is left of them where llama.cpp differs."""

from __future__ import annotations

import pytest

from qlora.export.gguf.probes import PROBE_TEXTS, Limit, comparable
from tests.export.gguf.awkward_texts import PROBES


def test_probe_texts_are_many_and_valid() -> None:
    assert 500 <= len(PROBES) <= 700
    assert 50 <= len(PROBE_TEXTS) <= 100
    assert set(PROBE_TEXTS) < set(PROBES)
    assert all(text.encode("utf-8").decode("utf-8") == text for text in PROBES)


TEXTS = ["plain", " begins with a space", "e\u0301tude", "Größe", "a <s> b", "a▁b", "plain"]
SPECIALS = ("<s>", "</s>")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ((), TEXTS[:6]),
        ((Limit.COMPOSITION,), [*TEXTS[:2], "étude", *TEXTS[3:6]]),
        # A letter with a combining mark has no letter case that llama.cpp knows, nor has one beyond ASCII.
        ((Limit.LETTER_CASE,), ["plain", " begins with a space", "a <s> b", "a▁b"]),
        ((Limit.LEADING_SPACE,), ["plain", "e\u0301tude", "Größe", "a▁b"]),
        ((Limit.AFTER_SPECIAL,), ["plain", " begins with a space", "e\u0301tude", "Größe", "a▁b"]),
        ((Limit.SPACE_MARKS,), TEXTS[:5]),
        ((Limit.PLAIN_TEXT, Limit.SPACE_MARKS), [f"<s>{text}" for text in TEXTS[:5]]),
    ],
    ids=lambda value: "+".join(limit.name for limit in value) if isinstance(value, tuple) else "",
)
def test_what_llama_cpp_cannot_tokenize_alike_is_left_out(limits: tuple[Limit, ...], left: list[str]) -> None:
    assert comparable(TEXTS, limits, SPECIALS) == left
