"""A GGUF file's tokens and template are those that llama.cpp finds in it, and its answers those of the merged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora.ask.keeping import row_of
from qlora.ask.llama import ByteDecoder, LlamaModel, common_length
from qlora.ask.opened import HowToOpen, named, open_model
from qlora.ask.talk import prompt_of
from qlora.errors import QloraError, TokenizerError
from qlora.events import Recorder
from tests.ask.cases import END, START, ToyLlama, toy_model, user
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
def test_a_file_reads_and_computes_as_the_merged_model_does(exports: dict[str, Path]) -> None:
    prompts, logits = [], []
    for kind in ("hf", "gguf"):
        with open_model(named(exports[kind]), HowToOpen(context=200), Recorder()) as opened:
            assert isinstance(opened, LlamaModel) == (kind == "gguf")
            assert opened.vocabulary == 384 and opened.context == 200
            asked = [{"role": "system", "content": "Be kind."}, user("Where is the station?")]
            prompts.append(prompt_of(opened, asked))
            row = row_of(opened)
            logits.append(row.logits(prompts[-1]).copy())
            longer = [*prompts[-1][:-4], *range(9, 40)]  # cut, and gone on with
            kept, reused = row.logits(longer).copy(), row.reused
            row.logits([5])
            assert reused == len(prompts[-1]) - 4 and np.abs(row.logits(longer) - kept).max() < 0.1
    assert prompts[0] == prompts[1]
    assert logits[0].argmax() == logits[1].argmax() and np.corrcoef(*logits)[0, 1] > 0.999


@pytest.mark.slow
def test_a_broken_file_is_two_lines(exports: dict[str, Path], tmp_path: Path) -> None:
    (whole,) = exports["gguf"].glob("*.gguf")
    content = whole.read_bytes()
    for number, cut in enumerate((8, len(content) // 3, len(content) - 100)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content[:cut])
        with pytest.raises(QloraError, match=file.name), open_model(named(file), HowToOpen(), Recorder()):
            pass
