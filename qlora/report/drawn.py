"""What a notebook shows of our results: a table instead of a dataclass' line. Everywhere else they stay as they are.

Jupyter asks an object for `_repr_mimebundle_`; an empty answer means "as Python shows it". What is drawn is rich's, as
on a terminal, written as HTML: every letter of it is escaped, whoever wrote it.
"""

from __future__ import annotations

import io
import sys
from html import escape
from typing import TYPE_CHECKING, Any

from qlora import shown
from qlora.redaction import HIDDEN, redact, values

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 100  # characters: what a cell of JupyterLab shows beside its side bar, on a screen of a laptop
_STYLE = (
    "margin:0;line-height:1.25;word-break:normal;font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace;font-size:13px"
)
_TABLE = "white-space:pre;overflow-x:auto"  # whose columns must not be broken
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"


def is_notebook() -> bool:
    """Whether a Jupyter kernel runs us, whose page can draw: Lab, Notebook, VS Code, Colab; not IPython's terminal."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def drawn(what: RenderableType) -> tuple[str, str]:
    """rich's picture as HTML and as plain text."""
    from rich.text import Text

    from qlora.report.console import Terminal

    settings: dict[str, Any] = {"force_jupyter": False, "force_terminal": True, "color_system": "truecolor"}
    screen = Terminal(io.StringIO(), record=True, width=WIDTH, _environ={}, **settings)
    is_text = isinstance(what, Text)
    screen.print(what, soft_wrap=is_text)
    style = f"{_STYLE};{_TEXT if is_text else _TABLE}"
    html = screen.export_html(code_format=f'<pre style="{style}">{{code}}</pre>', inline_styles=True, clear=False)
    return html, screen.export_text()


class Drawn:
    """What draws itself in a notebook. `drawing` is what it shows there."""

    def drawing(self) -> RenderableType:
        raise NotImplementedError

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Jupyter calls it for the last value of a cell."""
        if not is_notebook():
            return {}
        # Results quote paths and answers, and pass no gate as events do.
        html, text = drawn(self.drawing())
        for secret in values():  # which has other letters there where it has a sign of HTML
            html = html.replace(escape(secret), HIDDEN)
        html, text = (shown.block(redact(form)) for form in (html, text))
        return {"text/html": html + self.beside(), "text/plain": text}

    def beside(self) -> str:
        """HTML below the drawing."""
        return ""
