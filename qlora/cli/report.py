"""`qlora-report RUN…`: the page of one run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora import shown
from qlora.cli import common
from qlora.redaction import redact

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of one or several runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page's file: report.html in the run's folder by default, of several runs in the current one.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again while a run goes on, until it ends or Ctrl-C.")
    ] = False,
) -> None:
    """Draw runs as one page: curves, memory, events, answers, exam, exports, rows, recipe and versions.

    The page is one file that loads nothing and runs nothing. It is made of events.jsonl, so that a run that crashed, or
    is under way in another process, has one too. Several runs share their drawings, beside the keys that differ.
    """
    common.run(lambda: _run(runs, out, watch))


def _run(runs: list[Path], out: Path | None, watch: bool) -> None:
    from qlora.report.write import watch_report, write_report
    from qlora.stop import StopAsked, StopRequest

    stop = StopRequest()
    with common.Signals(stop, common.Screen(None, stop)):
        try:
            place = watch_report(runs, stop, out) if watch else write_report(runs, out)
        except StopAsked:
            raise stop.error("the page stands as it was last", "watch again, or draw it once without --watch") from None
    with common.answering():
        print(shown.one_line(redact(str(place))))


if __name__ == "__main__":
    app()
