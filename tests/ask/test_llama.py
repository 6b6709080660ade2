"""A GGUF file's tokens and template are those that llama.cpp finds in it, and its answers those of the merged model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora.ask.llama import ByteDecoder, LlamaModel, common_length
from qlora.ask.opened import HowToOpen, named, open_model
from qlora.ask.talk import Talk
from qlora.errors import QloraError, TokenizerError
from qlora.events import Recorder
from tests.ask.cases import END, GREEDY, START, ToyLlama, toy_model, user
from tests.families import CHATML


def test_a_prompt_is_the_template_s_text_in_the_file_s_tokens() -> None:
    model = toy_model()
    ids = model.chat.prompt_ids([user("hi")], None)
    assert ids == [START, *b"user\nhi", END, *b"\n", START, *b"assistant\n"]
    assert model.chat.end_token_ids == (END,)


def test_one_bos_where_the_file_or_the_template_puts_any() -> None:
    for template, adds in ((CHATML, True), ("<|im_end|>" + CHATML, False), ("<|im_end|>" + CHATML, True)):
        live = ToyLlama(template=template)
        live.about |= {"bos": END, "add_bos": adds}
        ids = toy_model(live).chat.prompt_ids([user("hi")], None)
        assert ids[0] == END and ids[1] == START
    plain = ToyLlama()
    plain.about["bos"] = END
    assert toy_model(plain).chat.prompt_ids([user("hi")], None)[0] == START


def test_a_file_without_a_template_knows_no_conversation() -> None:
    model = toy_model(ToyLlama(template=""))
    assert model.chat.template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        model.chat.prompt_ids([user("hi")], None)


def test_bytes_become_letters_when_they_are_whole() -> None:
    decoder = ByteDecoder(lambda token: bytes([token]))
    pieces = [decoder.take(token) for token in "ü世".encode() + b"\xe4\xb8"]
    assert pieces == ["", "ü", "", "", "世", "", ""] and decoder.rest() == "\ufffd"
    assert common_length([1, 2, 3], [1, 2, 4]) == 2 and common_length([], [1]) == 0


@pytest.mark.slow
def test_a_file_answers_as_the_merged_model_does(exports: dict[str, Path]) -> None:
    answers: list[list[str]] = []
    for kind in ("hf", "gguf"):
        with open_model(named(exports[kind]), HowToOpen(context=200), Recorder()) as opened:
            assert isinstance(opened, LlamaModel) == (kind == "gguf")
            assert opened.vocabulary == 384 and opened.context == 200
            talk = Talk(opened, "Be kind.")
            prompt = talk.ask("Where is the station?", GREEDY).writing.prompt
            talk.reset()
            texts, reused = [], []
            for question in ("Where is the station?", "And the lamp?"):
                answering = talk.ask(question, replace(GREEDY, max_tokens=20))
                texts.append(talk.answer(answering, lambda _: None)[:12])
                reused.append(answering.writing.reused)
            assert reused[0] == 0 and reused[1] > 20
            answers.append([*map(str, prompt), *texts])
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_broken_file_is_two_lines(exports: dict[str, Path], tmp_path: Path) -> None:
    (whole,) = exports["gguf"].glob("*.gguf")
    content = whole.read_bytes()
    for number, cut in enumerate((8, len(content) // 3, len(content) - 100)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content[:cut])
        with pytest.raises(QloraError, match=file.name), open_model(named(file), HowToOpen(), Recorder()):
            pass
