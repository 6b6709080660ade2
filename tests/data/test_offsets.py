"""Tokens and their offsets come from the library; where it gives up, that is a refusal."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from qlora import chatml
from qlora.data.offsets import tokens_of
from qlora.errors import TokenizerError
from tests.data.toys import assistant, chat_of, encode, talk, user
from tests.families import make_tokenizer


def test_ids_and_where_they_stand() -> None:
    tokenizer = make_tokenizer()
    (first, second) = tokens_of(tokenizer, ["What is it?", "<|im_end|>"])
    assert [tokenizer.decode(ids) for ids, _ in (first, second)] == ["What is it?", "<|im_end|>"]
    assert first[1][0][0] == 0 and first[1][-1][1] == len("What is it?") and second[1] == [(0, 10)]
    assert list(tokens_of(tokenizer, [])) == []


def test_a_tokenizer_that_gives_up_on_a_row_is_a_refusal() -> None:
    """The library's panic is no Exception: unseen, it would end the run with a page of Rust's."""
    chat = chat_of(chatml.template("<|im_end|>"))
    backend = chat.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:.|.)*[xq][yz]"), "isolated")
    with pytest.raises(TokenizerError, match=r"gave up on a row .*retry-limit"):
        encode(chat, talk(user("x" * 60), assistant("Yes")))
