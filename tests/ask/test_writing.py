"""Pieces of an answer are whole letters, stop strings are never seen, and an answer ends as it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.ask.keeping import row_of
from qlora.ask.writing import StopStrings, TokenDecoder, Writing
from tests.ask.cases import GREEDY, ToyLlama, toy_model, user
from tests.families import make_tokenizer

TOKENIZER = make_tokenizer(384)
TEXTS = ("Grüße, 世界! 👩‍👩‍👧 fin", "ends in a broken 👩"[:-1] + "\N{WOMAN}", " leading, tabs\tand\n\nlines ")


def writing(live: ToyLlama, question: str = "hi", stops: tuple[str, ...] = (), **settings: float) -> Writing:
    model = toy_model(live)
    prompt = model.chat.prompt_ids([user(question)], None)
    return Writing(model, row_of(model), prompt, replace(GREEDY, **settings), stops=stops)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_a_token_gives_whole_letters(text: str) -> None:
    one = writing(ToyLlama(lambda _: text))
    pieces = list(one)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert one.finish == "stop" and len(one.tokens) == len(text.encode())


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(0, 383), max_size=25))
def test_pieces_of_tokens_are_the_text_of_all_of_them(text: str, noise: list[int]) -> None:
    """Also of tokens that no text has: half letters, special ones."""
    tokenizer = TOKENIZER
    for ids in (tokenizer(text, add_special_tokens=False)["input_ids"], noise):
        decoder = TokenDecoder(tokenizer)
        pieces = [decoder.take(token) for token in ids] + [decoder.rest()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_no_piece_ends_in_half_a_letter() -> None:
    tokenizer = TOKENIZER
    for text in TEXTS:
        decoder = TokenDecoder(tokenizer)
        pieces = [decoder.take(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert not any("\ufffd" in piece for piece in pieces) and "".join(pieces) == text


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_a_stop_string_ends_the_text_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += watch.take(piece)
        assert not any(stop in shown for stop in stops)
        if watch.found:
            break
    whole = "".join(pieces)
    places = [at for stop in stops if (at := whole.find(stop)) >= 0]
    if places:
        assert watch.found and shown == whole[: len(shown)] and not any(stop in shown for stop in stops)
    else:
        assert shown + watch.rest() == whole and not watch.found


def test_what_ends_an_answer() -> None:
    live = ToyLlama(lambda _: "one two three")
    one = writing(live, stops=("two",))
    assert "".join(one) == "one " and one.finish == "stop"
    short = writing(live, max_tokens=3)
    assert "".join(short) == "one" and short.finish == "length"
    live.about["context"] = len(short.prompt) + 5
    full = writing(live)
    assert "".join(full) == "one t" and full.finish == "length"
    asked = writing(live)
    seen: list[str] = []
    asked.stopped = lambda: len(seen) == 2
    for piece in asked:
        seen.append(piece)
    assert seen == ["o", "n"] and asked.finish == "interrupted"


def test_an_answer_that_is_interrupted_in_its_prompt_has_no_text(tmp_path: Path) -> None:
    asked = writing(ToyLlama(), "x" * 300)
    asked.stopped = lambda: True
    assert list(asked) == [] and asked.finish == "interrupted"
