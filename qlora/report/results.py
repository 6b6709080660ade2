"""What a finished run and an export show of themselves in a notebook, read from its events as a page reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import RunFolderError

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes")


def history(run_dir: Path) -> dict[str, list[float]]:
    """Each step's figures, a list a column. Raises RunFolderError where the run wrote no events."""
    from qlora.report.run_files import events_of

    steps = events_of(run_dir).log.steps
    steps.settle()
    return {"step": list(steps.number), **{name: list(steps.columns[name]) for name in _COLUMNS}}


def text(lines: Sequence[str]) -> RenderableType:
    from rich.text import Text

    return Text("\n".join(lines))


def run_line(run_dir: Path) -> RenderableType:
    """Where the run lies. What came of it was drawn when it ended."""
    return text([f"run folder  {run_dir}"])


def loss_curve(run_dir: Path) -> str:
    """The run's losses as HTML with inline SVG; "" where there are no events to draw."""
    from qlora.report.curves import draw
    from qlora.report.run_files import Run, events_of
    from qlora.report.run_sections import charts

    try:
        events = events_of(run_dir)
    except RunFolderError:
        return ""
    events.log.steps.settle()
    out: list[str] = []
    draw(charts([Run("", events)])[0]).write(out)
    style = (Path(__file__).parent / "curve.css").read_text("utf-8")
    return f'<style>{style}</style><div class="qlora-curve">{"".join(out)}</div>'
