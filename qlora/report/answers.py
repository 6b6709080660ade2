"""Answers on a screen while they are written: thoughts dim, base and tuned model beside each other where there is room.

A model's output is a stranger's text: nothing in it steers the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora import shown
from qlora.report.console import Terminal

WIDE = 100  # columns of a terminal in which two answers stand beside each other
_DRAWS_PER_SECOND = 8
_FRAME_LINES = 8  # of a table with one row, and what else stands on the screen


class OneAfterOther:
    """Answers below each other, each as it comes. `titles`: one an answer; none are shown for a single one."""

    def __init__(self, console: Terminal, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._column = -1
        self._at_line_start = True

    def __enter__(self) -> OneAfterOther:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def show(self, column: int, text: str, is_thought: bool = False) -> None:
        """A piece of the answer `column`."""
        if column != self._column:
            self._end_line()
            if len(self._titles) > 1:
                self._console.print(Text(f"{self._titles[column]}:", style="bold"))
            self._column = column
        plain = shown.block(text)
        self._console.print(Text(plain, style="dim" if is_thought else ""), end="", soft_wrap=True)
        self._console.file.flush()
        self._at_line_start = plain.endswith("\n") if plain else self._at_line_start

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._console.print()
        self._at_line_start = True


class SideBySide:
    """Answers in columns. While they are written the end of each is seen; then the whole of them stays."""

    def __init__(self, console: Terminal, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._texts = [Text() for _ in titles]
        self._live = Live(console=console, refresh_per_second=_DRAWS_PER_SECOND, transient=True)

    def __enter__(self) -> SideBySide:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._console.print(self._table(self._texts))

    def show(self, column: int, text: str, is_thought: bool = False) -> None:
        """A piece of the answer `column`."""
        self._texts[column].append(shown.block(text), style="dim" if is_thought else None)
        width = max(1, self._console.width // len(self._texts) - 3)
        lines = max(1, self._console.height - _FRAME_LINES)
        ends = [Text("\n").join(text.wrap(self._console, width)[-lines:]) for text in self._texts]
        for end in ends:  # wrapped already: a line more than the screen has would be drawn twice
            end.no_wrap, end.overflow = True, "crop"
        self._live.update(self._table(ends))

    def _table(self, texts: Sequence[Text]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        for title in self._titles:
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*texts)
        return table


def answers_on(console: Terminal, titles: Sequence[str]) -> OneAfterOther | SideBySide:
    """Beside each other where there are several and the terminal is wide, else one after the other."""
    beside = len(titles) > 1 and console.is_live and console.width >= WIDE
    return SideBySide(console, titles) if beside else OneAfterOther(console, titles)
