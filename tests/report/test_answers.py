"""Answers on a screen: thoughts dim, two beside each other where there is room, and nothing steers the terminal."""

from __future__ import annotations

import io
import re

from qlora.report.answers import OneAfterOther, SideBySide, answers_on
from qlora.report.console import Terminal


def terminal(width: int = 80, live: bool = True) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    settings = {"force_terminal": live, "width": width, "height": 20, "color_system": "standard" if live else None}
    return Terminal(file, **settings, legacy_windows=False, _environ={}), file  # type: ignore[arg-type]


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_pieces_stand_as_they_came_and_thoughts_are_dim() -> None:
    console, file = terminal()
    with answers_on(console, ["tuned"]) as screen:
        assert isinstance(screen, OneAfterOther)
        for piece, thought in (
            ("<think>a", True),
            ("b</think>", True),
            ("\n\nThe ", False),
            ("answer [b]x[/b] :smile:", False),
        ):
            screen.show(0, piece, thought)
    assert plain(file.getvalue()) == "<think>ab</think>\n\nThe answer [b]x[/b] :smile:\n"
    assert "\x1b[2m<think>a" in file.getvalue() and "\x1b[2mThe" not in file.getvalue()


def test_a_pipe_gets_the_text_and_titles_alone() -> None:
    console, file = terminal(live=False)
    with answers_on(console, ["base", "tuned"]) as screen:
        screen.show(0, "x" * 300)
        screen.show(1, "y\n")
    assert file.getvalue() == "base:\n" + "x" * 300 + "\ntuned:\ny\n"


def test_nothing_in_an_answer_steers_the_terminal() -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07\r\u202eabc\u2069\x9b31m"
    for width in (60, 120):
        console, file = terminal(width)
        with answers_on(console, ["base", "tuned"]) as screen:
            screen.show(0, nasty)
            screen.show(1, nasty)
        ours = file.getvalue().replace("\x1b[?25l", "").replace("\x1b[?25h", "")
        assert not re.search(r"\x1b\][0-9]|\x07|\u202e|\x9b", ours) and "\x1b[2J" not in ours.replace("\x1b[2K", "")
        assert "␛]0;owned␇" in plain(ours).replace("\n", "")


def test_two_answers_stand_beside_each_other_where_there_is_room() -> None:
    console, file = terminal(120)
    with answers_on(console, ["base", "tuned"]) as screen:
        assert isinstance(screen, SideBySide)
        for number in range(60):
            screen.show(0, f"left {number}\n")
        screen.show(1, "right")
    last = plain(file.getvalue()).rsplit("base", 1)[1]
    assert "left 0 " in last and "left 59" in last and re.search(r"left 0 +right", last)
    assert isinstance(answers_on(terminal(80)[0], ["base", "tuned"]), OneAfterOther)
