"""Prompts in five languages: whole, the passage first, and what a base writes read as a question or an answer."""

from __future__ import annotations

import pytest

from qlora.study import prompts
from qlora.study.prompts import FRAMES, KINDS, answer_in, prompts_for, question_in
from tests.study.cases import chat, passage

LANGUAGES = ("de", "en", "es", "fr", "zh")


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_has_every_prompt(language: str) -> None:
    assert prompts.languages() == LANGUAGES and prompts.version() >= 1
    said, shown = prompts_for(language), passage()
    assert said.language == language and not said.foreign and set(said.kinds) == set(KINDS)
    for frame in FRAMES:
        asked = {said.ask(frame, shown, "The sentence.", kind, "ask") for kind in KINDS}
        asked |= {said.ask(frame, shown, "The sentence.", kind, "ask_exam") for kind in KINDS}
        assert len(asked) == 12, "each kind asks otherwise, and the exam in other words"
        answers = [said.answer(frame, shown, "Is it?"), said.answer_from(frame, [shown, shown], "Is it?")]
        for text in [*asked, *answers]:
            assert shown.text in text and shown.about in text
            assert "Is it?" in text or "The sentence." in text
        assert answers[1].count(shown.text) == 2
        closed = said.closed(frame, "Is it?")
        assert "Is it?" in closed and shown.text not in closed
    assert said.closed("chat", "Is it?") == "Is it?", "what a user writes"


def test_what_changes_stands_behind_the_passage() -> None:
    said, shown = prompts_for("en"), passage()
    for frame in FRAMES:
        one, other = (said.ask(frame, shown, sentence, "fact") for sentence in shown.sentences[:2])
        begin = one.index(shown.text) + len(shown.text)
        assert one[:begin] == other[:begin]


def test_braces_in_a_document_stay_what_they_are() -> None:
    shown = passage("{question}")
    text = prompts_for("en").answer("chat", shown, "What is {about}?")
    assert shown.text in text and "What is {about}?" in text


@pytest.mark.parametrize("language", ["other", "it", "", "pt-BR"])
def test_another_language_is_asked_in_english_for_answers_in_its_own(language: str) -> None:
    said, shown = prompts_for(language), passage()
    assert said.foreign and said.language == "en"
    assert "language of the text" in said.ask("chat", shown, "S.", "fact")
    assert "language of the text" in said.answer("chat", shown, "Q?")
    assert "language of the text" not in prompts_for("de-AT").answer("chat", shown, "Q?")


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ("Q: What is it?", "What is it?"),
        ("Sure, here it is.\n\n**Q:** What is it?\nA: Nothing.", "What is it?"),
        ("1. What is it?\n2. Who?", "What is it?"),
        ("- Question 1: What is it?", "What is it?"),
        ("Frage: Was ist es?", "Was ist es?"),
        ("Q： 它是什么？", "它是什么？"),
        ('"What is it?"', "What is it?"),
        ("It is a pump.", None),
        ("Q:\n", None),
        ("", None),
    ],
)
def test_a_question_is_found_in_what_was_written(written: str, question: str | None) -> None:
    assert question_in(written) == question


def test_an_answer_is_found_without_its_label() -> None:
    assert answer_in(" A: 7 years\n") == answer_in("7 years") == answer_in("Antwort: 7 years") == "7 years"
    assert answer_in("A pump") == "A pump"


def test_frames_become_tokens() -> None:
    given = chat()
    text = prompts_for("en").answer("chat", passage(), "Is it?")
    rendered = given.tokenizer.decode(prompts.prompt_ids(given, "chat", text))
    assert rendered == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    lines = prompts_for("en").answer("lines", passage(), "Is it?")
    assert given.tokenizer.decode(prompts.prompt_ids(given, "lines", lines)) == lines
    assert lines.endswith("A:\n"), "the answer begins a line, as it does behind a chat's header"
