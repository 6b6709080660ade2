"""A chat that a notebook keeps open."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from qlora.ask.chats import Answer, Chat, open_chat
from qlora.ask.settings import Sampling
from qlora.ask.talk import Talk
from qlora.errors import ExportError, UserError
from tests.ask.cases import GREEDY, ToyLlama, toy_model
from tests.notebooks import open_notebook


def chat_with(*lives: ToyLlama, sampling: Sampling = GREEDY) -> Chat:
    return Chat([Talk(toy_model(live)) for live in lives], sampling, ExitStack())


def test_turns_are_kept_until_they_are_forgotten() -> None:
    seen: list[str] = []
    live = ToyLlama()
    chat = chat_with(live)
    assert str(chat.ask("one")) == "[one]" and chat.ask("two").finish == "stop"
    seen.append(bytes(token for token in live.row if token < 256).decode())
    assert "one" in seen[0] and "two" in seen[0]
    chat.reset()
    chat.ask("three")
    assert "one" not in bytes(token for token in live.row if token < 256).decode()


def test_a_closed_one_gives_back_what_it_held() -> None:
    closed: list[str] = []
    stack = ExitStack()
    stack.callback(closed.append, "model")
    with Chat([Talk(toy_model())], GREEDY, stack) as chat:
        chat.ask("one")
    assert closed == ["model"]
    chat.close()
    with pytest.raises(UserError, match="the chat is closed"):
        chat.ask("two")


def test_an_adapter_and_its_base_are_asked_and_draw_themselves(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=0, max_tokens=3)
    with open_chat(adapter, compare=True, sampling=sampling) as chat:
        answer = chat.ask("What is the price of <b>lamp</b> 3?")
    assert answer.base is not None and answer.finish == "length"
    page = open_notebook(monkeypatch)
    bundle = answer._repr_mimebundle_()
    assert "<b>lamp" not in bundle["text/html"] and "<b>lamp</b> 3?" in bundle["text/plain"]
    assert "tuned" in bundle["text/plain"] and "max_tokens" in bundle["text/plain"] and page.outputs == []


def test_what_cannot_be_opened_so(adapter: Path, exports: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="temperature is -1"):
        open_chat(adapter, sampling=Sampling(temperature=-1))
    with pytest.raises(ExportError, match="its base cannot be asked"):
        open_chat(exports["hf"], compare=True)
    with pytest.raises(ExportError, match="no such file"):
        open_chat(adapter / "none")


def test_an_interrupt_ends_the_answer_and_of_two_talks_none_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    open_notebook(monkeypatch)
    live, other = ToyLlama(), ToyLlama()
    alone, both = chat_with(live), chat_with(live, other)
    both.ask("before")
    live.before_each = lambda: os.kill(os.getpid(), signal.SIGINT) if len(live.computed) > 3 else None
    live.computed.clear()
    answer = alone.ask("a long question")
    assert answer == Answer("a long question", answer.text, None, "interrupted") and len(answer.text) < 16
    live.computed.clear()
    assert both.ask("again").finish == "interrupted"
    assert [len(talk.messages) for talk in both._talks] == [2, 2]


def test_a_secret_in_an_answer_is_hidden_however_long_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    open_notebook(monkeypatch)
    token = "hf_" + "Ab3" * 12
    bundle = Answer("x" * 70 + f"/{token}", "y" * 60 + f"={token}", "z" * 80 + f":{token}", "stop")._repr_mimebundle_()
    assert all("Ab3" not in form for form in bundle.values()) and bundle["text/plain"].count("[hidden]") >= 1
