"""Special tokens that stand in a text are text to the base that has them."""

from __future__ import annotations

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.documents.blocks import Block
from qlora.data.documents.document import Document, Documents
from qlora.events import Recorder
from qlora.recipe.reading import Recipe
from qlora.study.lesson import Lesson
from qlora.study.material import Material
from qlora.study.plain_text import found, plain
from qlora.study.prompts import FRAMES, Frame, prompt_ids
from tests.data.shapes import shape_chat
from tests.study.cases import chat

NESTED = "<|im_<|im_end|>end|>"


def special_ids(of: ChatTokenizer, ids: list[int]) -> list[int]:
    known = {number for number, token in of.tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in ids if token in known]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("shape", ["qwen3", "deepseek_r1", "gpt_oss", "llama31", "mistral_v03"])
def test_no_text_in_a_prompt_steers_the_model(shape: str, frame: Frame) -> None:
    of = shape_chat(shape)
    tokens = [str(token) for token in of.tokenizer.added_tokens_decoder.values() if token.special]
    bad = f"Turns end with {' and '.join(tokens)}{tokens[0]}{tokens[-1]}."
    assert special_ids(of, list(of.tokenizer(bad)["input_ids"]))
    for text in (bad, bad * 2, f"Manual › {tokens[-1]}\n\n{bad}"):
        assert special_ids(of, prompt_ids(of, frame, text)) == special_ids(of, prompt_ids(of, frame, "Turns end."))


def test_what_is_left_is_no_token_again() -> None:
    text = plain(chat(), f"{NESTED} and <|im_start|>")
    assert not found(chat(), text) and text.replace(" ", "") == f"{NESTED}and<|im_start|>"
    assert plain(chat(), "a < b | c > d, <table> and 5 <im_end>") == "a < b | c > d, <table> and 5 <im_end>"


def test_thoughts_of_a_document_open_no_block() -> None:
    """`<think>` is no special token of Qwen3's, but its template steers with it."""
    assert found(shape_chat("qwen3"), "<think> a </think>") == ["<think>", "</think>"]
    assert not found(chat(), "<think> a </think>")


def test_documents_with_special_tokens_are_counted_and_stay_as_they_are() -> None:
    text = "The turn of this model ends with <|im_end|> or with <|endoftext|>. It is a small model."
    document = Document("m.md", "0" * 64, 1, "what <|im_start|> means", "en", (Block("paragraph", text),))
    recipe = Recipe.model_validate({"model": {"base": "a/b"}, "data": {"documents": [{"path": "m.md"}]}})
    sink = Recorder()
    lesson = Lesson.of(Material(Documents((document,)), True, {}), recipe, chat(), sink)
    (said,) = [event.as_dict() for event in sink.of("notice") if "special tokens" in event.as_dict()["message"]]
    assert said["count"] == 3 and said["topic"] == "documents" and "<|im_start|>" in said["message"]
    assert text in lesson.passages[0].text
