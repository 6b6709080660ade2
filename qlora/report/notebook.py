"""The screen in a notebook: the same picture as on a terminal, in outputs that are drawn over while the run goes on.

rich's own way there needs a widget library, warns where that is missing, and makes an output of each line. Here lines
and panel are one output, which Jupyter replaces under its `display_id`: lines stay, the panel is below the last of
them, and is gone when the work is. An output that has grown long is left as it is and another one begun, so that no
update sends much; of very many the first and the newest lines are kept.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from qlora import events
from qlora.report.console import ConsoleSink, Terminal
from qlora.report.drawn import WIDTH, drawn

OUTPUT_CHARACTERS = 24_000  # of HTML, in one output
MOST_OUTPUTS = 20  # of a run: half a megabyte in the notebook's file
SECONDS = 0.5  # between two drawings of the panel


class NotebookSink(ConsoleSink):
    """Draws a run below the cell that runs it.

    `results` False leaves out the table that the cell's value will draw itself.
    """

    def __init__(self, results: bool = True) -> None:
        super().__init__(Terminal(width=WIDTH, force_jupyter=False, force_terminal=True, _environ={}))
        self._results = results
        self._lines: list[tuple[str, str]] = []  # HTML and text of the output that is written on
        self._handle: Any = None
        self._outputs = 0
        self._left_out = 0
        self._has_panel = False
        self._drawn_at = float("-inf")
        self._drawn_task = ""

    def close(self) -> None:
        """Take the panel away."""
        self.task = None
        if self._has_panel:
            self._has_panel = False
            self._show()

    def _fidelity(self, event: events.Fidelity) -> None:
        if self._results:
            super()._fidelity(event)

    def _end(self, event: events.End) -> None:
        super()._end(event)
        self.last_step = None  # an export that follows has a panel of its own

    def _print(self, what: RenderableType) -> None:
        self._lines.append(drawn(what))
        if sum(len(html) for html, _ in self._lines) > OUTPUT_CHARACTERS and len(self._lines) > 1:
            self._begin_another(self._lines.pop())
        self._show()

    def _begin_another(self, line: tuple[str, str]) -> None:
        """Leave the output without its panel and write on in a new one; where there are many, in this one."""
        if self._outputs >= MOST_OUTPUTS:
            half = len(self._lines) // 2 + 1
            self._left_out += half
            self._lines = [*self._lines[half:], line]
            return
        has_panel, self._has_panel = self._has_panel, False
        self._show()
        self._handle, self._lines, self._has_panel = None, [line], has_panel

    def _draw(self) -> None:
        """The panel, at most every half second; at once where a task begins or ends: minutes may pass until the next
        event."""
        task = self.task.task if self.task is not None else ""
        if task != self._drawn_task or time.monotonic() - self._drawn_at >= SECONDS:
            self._drawn_at, self._drawn_task, self._has_panel = time.monotonic(), task, True
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        parts = list(self._lines)
        if self._left_out:
            said = f"… {self._left_out:,} lines are left out here; {events.EVENTS_FILE} in the run's folder has them"
            parts.insert(0, drawn(Text(said, style="dim")))
        if self._has_panel:
            parts.append(drawn(self.picture()))
        html, text = ("".join(part[form] for part in parts) for form in (0, 1))
        bundle = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
            self._outputs += 1
        else:
            self._handle.update(bundle, raw=True)
