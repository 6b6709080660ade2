"""`qlora-exam RUN`: what a model that learnt documents knows of them, asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli import common

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def exam(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that learnt documents.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="JSONL, JSON or CSV of question and answer, asked instead of the run's own questions.",
        ),
    ] = None,
    of: Annotated[
        Path | None,
        typer.Option(
            "--of",
            metavar="EXPORT",
            help="A merged folder or a GGUF file (through llama.cpp), asked instead of the adapter.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Ask base and tuned model, alone, with the passages that a search finds, and the base with the right passage.

    What was answered before by the same weights is not asked again. Without --questions and --of, exam.json and exam.md
    in the run's folder are written anew.
    """
    common.run(lambda: _run(run, questions, of, as_json))


def _run(run: Path, questions: Path | None, of: Path | None, as_json: bool) -> None:
    from qlora.errors import StoppedBySignal
    from qlora.events import Sinks
    from qlora.examine import examine
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopAsked, StopRequest

    stop = StopRequest()
    screen = common.Screen(None if as_json else ConsoleSink(), stop)
    with common.Signals(stop, screen):
        try:
            figures = examine(run, questions=questions, of=of, sink=Sinks(screen), stop=stop)
        except StopAsked:
            stopped: StoppedBySignal = stop.error("what was answered so far is kept", "run it again: it goes on there")
            raise stopped from None
        finally:
            screen.close()
    if as_json:
        common.answer(figures)


if __name__ == "__main__":
    app()
