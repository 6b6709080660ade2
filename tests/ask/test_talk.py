"""A conversation: what is remembered, what no longer fits, and what is saved of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.ask.talk import Talk
from qlora.data.formats import to_conversation
from qlora.errors import DataError, UserError
from tests.ask.cases import GREEDY, ToyLlama, toy_model
from tests.families import CHATML


def say(talk: Talk, question: str, max_tokens: int = 100) -> str:
    return talk.answer(talk.ask(question, replace(GREEDY, max_tokens=max_tokens)), lambda _: None)


def test_the_second_turn_does_not_pay_for_the_first() -> None:
    live = ToyLlama()
    talk = Talk(toy_model(live), "Be kind.")
    assert say(talk, "one") == "[one]"
    first = sum(live.computed)
    live.computed.clear()
    assert say(talk, "two") == "[two]"
    again = Talk(toy_model(other := ToyLlama()), "Be kind.", messages=talk.messages[:2])
    assert say(again, "two") == "[two]"
    assert sum(live.computed) < sum(other.computed) - 40 and first > 40


def test_a_memory_that_cannot_be_cut_is_computed_anew() -> None:
    live = ToyLlama()
    live.stays = False
    talk = Talk(toy_model(live))
    assert say(talk, "one") == "[one]"
    assert talk.undo() and say(talk, "two") == "[two]" and not Talk(toy_model(live)).undo()


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    talk = Talk(toy_model(), "System.")
    for number in range(4):
        answering = talk.ask(f"{number}" * 60, GREEDY)
        talk.answer(answering, lambda _: None)
    assert (
        answering.left_out == 1 and len(talk.messages) == 4
    )  # 400 tokens: of four turns the last two fit, and a new one
    assert talk.messages[0]["content"] == "2" * 60
    assert "System." in bytes(t for t in answering.writing.prompt if t < 256).decode()
    before = list(talk.messages)
    with pytest.raises(DataError, match="the question has"):
        talk.ask("x" * 500, GREEDY)
    assert talk.messages == before


def test_what_a_template_refuses_leaves_the_conversation_as_it_was() -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    talk = Talk(toy_model(ToyLlama(template=refuses)), "System.")
    with pytest.raises(DataError, match="no system here"):
        talk.ask("one", GREEDY)
    talk.system = ""
    assert talk.messages == [] and say(talk, "one") == "[one]"


def test_what_is_saved_is_a_row_that_the_trainer_reads(tmp_path: Path) -> None:
    talk = Talk(toy_model(), "System.")
    with pytest.raises(UserError, match="no whole answer"):
        talk.save(str(tmp_path / "rows.jsonl"))
    say(talk, "one ü")
    say(talk, "a long one", max_tokens=3)
    place = Path(talk.save(str(tmp_path / "rows.jsonl")))
    (line,) = place.read_text("utf-8").splitlines()
    read = to_conversation(json.loads(line), "messages").messages
    assert [message["role"] for message in read] == ["system", "user", "assistant", "user", "assistant"]
    assert read[2]["content"] == "[one ü]" and "train" not in read[2]
    assert read[4] == {"role": "assistant", "content": "[a ", "train": False}  # a cut answer is no example
    for name in (place, tmp_path, tmp_path / "none" / "rows.jsonl"):
        with pytest.raises(UserError):
            talk.save(str(name))
    assert place.read_text("utf-8") == line + "\n"


def test_an_answer_that_was_stopped_before_it_began_takes_its_question_along() -> None:
    talk = Talk(toy_model())
    answering = talk.ask("one", GREEDY)
    answering.writing.stopped = lambda: True
    assert talk.answer(answering, lambda _: None) == "" and talk.messages == []
    live = ToyLlama()
    broken = Talk(toy_model(live))
    answering = broken.ask("one", GREEDY)
    live.before_each = lambda: (_ for _ in ()).throw(UserError("no", "no"))
    with pytest.raises(UserError):
        broken.answer(answering, lambda _: None)
    assert broken.messages == []
    live.before_each = lambda: None
    assert say(broken, "two") == "[two]"
