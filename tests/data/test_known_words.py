"""Words that were met before come out as with the engine alone: ids and places, whatever stands around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qlora.data import known_words
from qlora.data.known_words import KnownWords, cuts_at_spaces
from qlora.data.offsets import begun_before, ended_at
from tests.data.toys import family_tokenizer
from tests.tokenizers import byte_level, gemma

_WORDS = "the The quick it's THEY'LL don't x 1 1234 3.14 naïve größer e\u0301 привет 日本語 한국어 🚀 👍🏽 def f(x):"
_SIGNS = "------ ... $99.99 (50%) /path/to?q=1 's ' / ! <|im_start|> <|im_end|> <|im_ <|endoftext|>"
BITS = (
    *(*_WORDS.split(), *_SIGNS.split(), "\u0301", "\u200d", "\x00", "\u2581", "assistant\n", "!\n", "\n    return"),
    *(" ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85"),
)
BYTE_LEVEL = ("gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm", "tekken", "gpt-4o", "seed-coder", "minicpm5")


def texts_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(BITS, k=draw.randrange(0, 40))) for _ in range(count)]


def both(engine: Tokenizer, words: KnownWords, texts: list[str]) -> tuple[list[Any], list[Any]]:
    found = words.encode(texts)
    assert found is not None, "the tokenizer allows it"
    whole = engine.encode_batch(texts, add_special_tokens=False)
    return [(ids, list(places)) for ids, places in zip(*found, strict=True)], [(one.ids, one.offsets) for one in whole]


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_the_same_as_with_the_engine_alone(pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "TRIED", 0)
    content = (byte_level(tmp_path, pre, normalizer="NFC") / "tokenizer.json").read_text(encoding="utf-8")
    engine = Tokenizer.from_str(content)
    words = KnownWords(engine, content)
    for seed in range(3):
        for ours, theirs in zip(*both(engine, words, texts_of(seed, 150)), strict=True):
            assert ours == theirs


def test_places_are_found_as_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where offsets are trimmed, so that tokens of spaces alone have no width."""
    monkeypatch.setattr(known_words, "TRIED", 0)
    for family in ("qwen2", "llama3"):
        engine = family_tokenizer(family).backend_tokenizer
        words = KnownWords(engine, engine.to_str())
        texts = [*texts_of(9, 60), ""]
        found = words.encode(texts)
        if found is None:
            continue
        for text, places in zip(texts, found[1], strict=True):
            listed = list(places)
            assert [places[at] for at in range(-len(places), len(places))] == listed + listed
            assert places[1:3] == listed[1:3] and len(places) == len(listed)
            for place in range(len(text) + 2):
                assert ended_at(places, place) == ended_at(listed, place)
                assert begun_before(places, place) == begun_before(listed, place)
            with pytest.raises(IndexError):
                places[len(listed)]


def test_a_word_goes_to_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "TRIED", 0)
    engine = family_tokenizer("qwen2").backend_tokenizer

    class Counting:
        encode_special_tokens = False

        def encode_batch(self, texts: list[str], **keys: Any) -> Any:
            asked.extend(texts)
            return engine.encode_batch(texts, **keys)

    asked: list[str] = []
    words, text = KnownWords(Counting(), engine.to_str()), "<|im_start|>user\nA word, a word<|im_end|>\n"
    words.encode([text, text])
    assert sorted(asked) == ["\n", " a", " word", " word,", "<|im_end|>", "<|im_start|>", "A", "user\n"]
    words.encode([text])
    assert len(asked) == 8
    monkeypatch.setattr(known_words, "KEPT_CHARS", 10)
    words.encode([text])
    assert len(asked) == 16, "what is kept has an end"


def test_one_difference_ends_it() -> None:
    engine = family_tokenizer("qwen2").backend_tokenizer

    class Other:
        """What an engine might do that reads a text otherwise than its parts."""

        encode_special_tokens = False

        def encode_batch(self, texts: list[str], **keys: Any) -> Any:
            return engine.encode_batch([f"{text}." if text.count(" ") > 1 else text for text in texts], **keys)

    words = KnownWords(Other(), engine.to_str())
    assert words.encode(["one two"]) is not None
    assert words.encode(["one two three"]) is None and words.encode(["one two"]) is None


def described(tmp_path: Path, pre: str = "qwen2") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((byte_level(tmp_path, pre) / "tokenizer.json").read_text(encoding="utf-8"))
    return content


def test_what_its_structure_does_not_show_goes_to_the_engine(tmp_path: Path) -> None:
    plain = described(tmp_path)
    assert cuts_at_spaces(plain)
    byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    own = {"type": "Split", "pattern": {"Regex": r"\p{L}+ \p{L}+|\s+"}, "behavior": "Isolated", "invert": False}
    behind = {**own, "pattern": {"Regex": r"(?<=a) ?\p{L}+|\s+"}}
    some = {**own, "pattern": {"Regex": r" ?\p{L}+"}}
    token = plain["added_tokens"][0]
    others: list[dict[str, Any]] = [
        {"model": {**plain["model"], "type": "Unigram"}},
        {"model": {**plain["model"], "dropout": 0.1}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [own, {**byte, "use_regex": False}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [behind, {**byte, "use_regex": False}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [some, {**byte, "use_regex": False}]}},
        {"pre_tokenizer": byte},
        {"pre_tokenizer": None},
        {"post_processor": byte},
        {"post_processor": {"type": "BertProcessing"}},
        {"added_tokens": [{**token, "content": "two words"}]},
        *({"added_tokens": [{**token, flag: True}]} for flag in ("lstrip", "rstrip", "single_word")),
    ]
    for change in others:
        assert not cuts_at_spaces({**plain, **change}), change
    assert not cuts_at_spaces(json.loads((gemma(tmp_path) / "tokenizer.json").read_text(encoding="utf-8")))
    engine = Tokenizer.from_str(json.dumps(plain))
    engine.encode_special_tokens = True  # then special tokens are text like any other
    assert KnownWords(engine, json.dumps(plain)).encode(["a b"]) is None
