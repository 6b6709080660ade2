"""`qlora-eval RUN_OR_MODEL… DATA`: base, adapter, merged folder and GGUF file on the same rows, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli import common

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def evaluate(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL... DATA",
            help="Runs, adapters, merged folders or GGUF files; last the rows: a file, glob, folder or hub:NAME.",
        ),
    ],
    answers: Annotated[int, typer.Option("--answers", min=0, max=100_000, help="Rows that are answered.")] = 50,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=1_000_000, help="Rows that are measured at most, spread over all.")
    ] = 500,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base of each adapter beside it.")] = True,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=16, max=1 << 20, help="Tokens of a row at most.", show_default="the run's"),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="PATH_OR_NAME", help="Where an adapter's base lies, if it has moved."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            "--harness",
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, by name or as a YAML file, with commas between them; "
            "then DATA may be left out.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows of a task at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Loss, perplexity, token accuracy, exact match and contains-answer of each model, with intervals and paired tests.

    Rows are read as training reads them, answers end where training ends them, and a base is the one of the training by
    its bytes. One model is in memory at a time.
    """
    how = {"base": base, "rows": rows, "answers": answers, "max_length": max_length, "base_model": base_model}
    common.run(lambda: _run(names, how, (harness, limit), as_json))


def _run(names: list[str], how: dict[str, Any], tasks: tuple[str | None, int | None], as_json: bool) -> None:
    from qlora.errors import ExportError, StoppedBySignal
    from qlora.events import Sinks
    from qlora.stop import StopAsked, StopRequest

    models, data = _split(names, tasks[0] is not None)
    if tasks[0] is None and tasks[1] is not None:
        raise ExportError(
            "`limit` is for tasks, and there is no `harness`", "name tasks with `harness`, or leave it out"
        )
    if tasks[0] is not None:
        from qlora.ask import harness

        harness.check_installed()
        harness.split_tasks(tasks[0])
    stop = StopRequest()
    screen = common.Screen(None, stop)
    with common.Signals(stop, screen):
        from qlora import evaluate as work

        if not as_json:
            from qlora.report.console import ConsoleSink

            screen.inner = ConsoleSink()
        chosen = work.HowToEvaluate(**how)
        figures: dict[str, Any] = {}
        try:
            if data is not None:
                figures = work.evaluate(models, data, how=chosen, sink=Sinks(screen), stop=stop)
            if tasks[0] is not None:
                figures["harness"] = work.by_harness(models, tasks[0], limit=tasks[1], how=chosen, sink=Sinks(screen))
        except StopAsked:
            stopped: StoppedBySignal = stop.error("nothing was measured to its end", "run it again")
            raise stopped from None
        finally:
            screen.close()
    if as_json:
        common.answer(figures)
        return
    with common.answering():
        _show(figures)


def _split(names: list[str], with_harness: bool) -> tuple[list[str], str | None]:
    """The models, and the rows: what stands last, unless it is a model and only a harness is asked for."""
    from qlora.ask.opened import named
    from qlora.errors import ExportError

    if with_harness:
        if len(names) == 1 or not Path(names[-1]).expanduser().exists():
            is_rows = len(names) > 1 and names[-1].startswith("hub:")
            return (names[:-1], names[-1]) if is_rows else (names, None)
        try:
            named(names[-1])
        except ExportError:
            return names[:-1], names[-1]
        return names, None
    if len(names) < 2:
        what = f"{names[0]}: only one name is given"
        raise ExportError(what, "name a run or model, and last the rows, such as runs/first data/eval.jsonl")
    return names[:-1], names[-1]


def _show(figures: dict[str, Any]) -> None:
    from qlora import shown
    from qlora.redaction import redact_all
    from qlora.report import evaluation

    print("\n".join(evaluation.lines(shown.plain_values(redact_all(figures)))))


if __name__ == "__main__":
    app()
