"""A conversation by hand: its commands, what Ctrl-C and Ctrl-D do, questions of several lines."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.ask.settings import Sampling
from qlora.ask.talk import Talk
from qlora.cli.conversation import COMMANDS, Conversation, as_utf8
from qlora.errors import DoesNotFit, StoppedBySignal
from qlora.report.console import Terminal
from qlora.stop import StopRequest
from tests.ask.cases import ToyLlama, toy_model

GREEDY = Sampling(temperature=0)


def hold(
    *typed: str | Callable[[], str], live: ToyLlama | None = None, sampling: Sampling = GREEDY
) -> tuple[str, Talk]:
    """A conversation in which this is typed, until it ends; what was shown, and what is left of it."""
    file = io.StringIO()
    talk = Talk(toy_model(live))
    lines = iter(typed)

    def read(prompt: str) -> str:
        try:
            line = next(lines)
        except StopIteration:
            raise EOFError from None
        return line if isinstance(line, str) else line()

    stop = StopRequest()
    Conversation([talk], sampling, Terminal(file, width=200), stop).loop(read)
    return file.getvalue(), talk


def interrupt() -> str:
    signal.raise_signal(signal.SIGINT)
    return ""


def test_questions_are_answered_until_the_end_of_input() -> None:
    shown, talk = hold("hi", "", "//slash", '"""', "two", 'lines"""')
    assert "[hi]\n4 tokens" in shown and "[/slash]" in shown and "[two\nlines]" in shown
    assert [message["content"] for message in talk.messages][::2] == ["hi", "/slash", "two\nlines"]


def test_commands_do_what_help_says(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    shown, talk = hold(
        "/help", "/system Be kind.", "/system", "/set temperature 0.5", "/set top_k=3", "one", "two", "/undo",
        f"/save {file}", f"/save {file}", "/save", "/nothing", "/set beams 4", "/set", "/exit", "never asked",
    )  # fmt: skip
    assert all(command in shown for command in COMMANDS) and "never asked" not in shown
    row = json.loads(file.read_text("utf-8"))["messages"]
    assert [message["content"] for message in row] == ["Be kind.", "one", "[one]"]
    for said in (
        "is there already",
        "no file is named",
        "no command /nothing",
        "no setting 'beams'",
        "temperature 0.5, ",
    ):
        assert said in shown
    assert "top_k 3" in shown
    shown, talk = hold("/system Be kind.", "one", "/reset", "/undo", "/system none", "two")
    assert [message["content"] for message in talk.messages] == ["two", "[two]"] and "nothing to forget" in shown


def test_ctrl_c_stops_an_answer_and_takes_back_a_line_and_ends_nothing() -> None:
    live = ToyLlama(lambda _: "x" * 50)

    def stop_soon() -> None:
        if len(live.computed) == 12:
            os.kill(os.getpid(), signal.SIGINT)

    live.before_each = stop_soon
    before = signal.getsignal(signal.SIGINT)
    shown, talk = hold("hi", interrupt, "again", live=live)
    assert ", stopped" in shown and "Ctrl-D ends" in shown and signal.getsignal(signal.SIGINT) is before
    cut, whole = talk.messages[1], talk.messages[3]
    assert 0 < len(cut["content"]) < 50 and cut["train"] is False and whole["content"] == "x" * 50


def test_an_error_is_said_and_the_conversation_goes_on() -> None:
    live = ToyLlama()
    calls = iter([DoesNotFit("no memory", "ask less")])

    def fail_once() -> None:
        for error in calls:
            raise error

    live.before_each = fail_once
    shown, talk = hold("x" * 600, "one", "two", live=live)
    assert "the question has" in shown and "error: no memory" in shown and "[two]" in shown and len(talk.messages) == 2


def test_a_signal_to_end_ends_it() -> None:
    stop = StopRequest()
    stop.set(signal.SIGTERM)

    def read(_: str) -> str:
        raise KeyboardInterrupt  # as the handler of SIGTERM does

    with pytest.raises(StoppedBySignal) as ended:
        Conversation([Talk(toy_model())], GREEDY, Terminal(io.StringIO()), stop).loop(read)
    assert ended.value.exit_code == 143


def test_what_is_no_text_becomes_text() -> None:
    assert as_utf8("a\udcff b") == "a\ufffd b" and as_utf8("ü 世") == "ü 世"


@pytest.mark.parametrize("fails", [False, True])
def test_what_one_of_two_models_did_not_answer_is_forgotten_by_both(fails: bool) -> None:
    """Ctrl-C in the base's answer, and memory that runs out in the other's: later answers have one history."""
    lives = [ToyLlama(lambda _: "x" * 50), ToyLlama()]
    talks = [Talk(toy_model(live)) for live in lives]
    typed = iter(["one", "two", "three"])

    def during_two() -> None:
        asked = talks[0].messages
        if len(asked) >= 3 and asked[2]["content"] == "two":
            if fails:
                raise DoesNotFit("no memory", "ask less")
            os.kill(os.getpid(), signal.SIGINT)

    lives[1 if fails else 0].before_each = during_two

    def read(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    file = io.StringIO()
    Conversation(talks, GREEDY, Terminal(file, width=200), StopRequest()).loop(read)
    questions = [[message["content"] for message in talk.messages][::2] for talk in talks]
    assert questions == [["one", "three"]] * 2 and [len(talk.messages) for talk in talks] == [4, 4]
    assert file.getvalue().count("the question is forgotten") == 1
