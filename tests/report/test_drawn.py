"""What draws itself in a notebook, and nowhere else."""

from __future__ import annotations

import pytest
from rich.console import RenderableType
from rich.text import Text

from qlora.report.drawn import Drawn, drawn, is_notebook
from tests.notebooks import open_notebook


class Thing(Drawn):
    def __init__(self, text: str = "two words") -> None:
        self.text = text

    def drawing(self) -> RenderableType:
        return Text(self.text)


def test_only_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_notebook() and Thing()._repr_mimebundle_() == {}
    open_notebook(monkeypatch, kernel=None)
    assert not is_notebook() and Thing()._repr_mimebundle_() == {}
    open_notebook(monkeypatch)
    bundle = Thing()._repr_mimebundle_()
    assert is_notebook() and bundle["text/plain"] == "two words\n" and "two words" in bundle["text/html"]


def test_every_letter_is_escaped_and_markup_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    open_notebook(monkeypatch)
    quoted = "<script>alert('[bold]')</script> &lt; :smile: \x1b[31m runs/hf_LooksLikeATokenOfTheHub0123"
    html, text = Thing(quoted)._repr_mimebundle_().values()
    assert "<script" not in html and "&lt;script&gt;" in html and "&amp;lt;" in html and "[bold]" in html
    assert "[bold]" in text and ":smile:" in text and "\x1b" not in html + text
    assert "hf_LooksLike" not in html + text


def test_a_password_with_signs_of_html_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    open_notebook(monkeypatch)
    secret = "p<w&d\"x'12345"
    monkeypatch.setenv("TRACKER_PASSWORD", secret)
    html, text = Thing(f"before {secret} behind")._repr_mimebundle_().values()
    assert "before [hidden] behind" in html and text == "before [hidden] behind\n"


def test_a_long_line_is_left_to_the_page_and_a_table_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    html, text = drawn(Text("word " * 60, style="green"))
    assert text.count("\n") == 1 and "pre-wrap" in html and "color" in html
    table = Table.grid()
    table.add_row("word " * 60)
    html, text = drawn(table)
    assert max(map(len, text.splitlines())) <= 100 and "white-space:pre;" in html
