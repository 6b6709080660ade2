"""`qlora-data RECIPE`: what the model will see of a recipe's rows, before anything is trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora import files, shown
from qlora.cli import common
from qlora.redaction import redact_all

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def data(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a key; repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, max=1000, help="Draw so many rows.")] = 3,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page too, one file that loads nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    study: Annotated[
        bool,
        typer.Option("--study", help="Let the base ask, answer and filter; then stop. qlora-train --resume goes on."),
    ] = False,
) -> None:
    """Show what the model will see: rows token by token, what is trained, what is left out and why.

    Needs no GPU and no weights: of the base its config and tokenizer alone, but for --study, which loads it. Warnings
    come last, each with what mends it; they do not change the exit code.
    """
    common.run(lambda: _run(recipe, set_ or [], (rows, study), html, as_json))


def _run(path: Path, overrides: list[str], what: tuple[int, bool], html: Path | None, as_json: bool) -> None:
    from qlora.recipe.reading import load_recipe
    from qlora.stop import StopRequest

    files.user_path(path, "the recipe")
    loaded = load_recipe(path, overrides)
    if html is not None:
        from qlora.report import page

        html = page.check_place(html)
    stop = StopRequest()
    screen = common.Screen(None, stop)
    with common.Signals(stop, screen):
        from qlora import look
        from qlora.data.xray.warnings import warnings_of
        from qlora.look_study import LookedAtStudy, look_at_study

        if not as_json:
            from qlora.report.console import ConsoleSink

            screen.inner = ConsoleSink()
        rows, study = what
        try:
            seen: look.Looked
            if study:
                seen = look_at_study(loaded, name=path.stem, rows=rows, sink=screen, stop=stop)
            else:
                seen = look.look_at_data(loaded, rows=rows, sink=screen)
        finally:
            screen.close()
    answer: dict[str, Any] = {"recipe": path.name, "base": loaded.model.base, "rows": None, "documents": None}
    answer["study"] = asdict(seen.study) if isinstance(seen, LookedAtStudy) else None
    if seen.rows is not None:
        answer["rows"] = {**seen.rows.as_dict(), "warnings": [asdict(one) for one in warnings_of(seen.rows)]}
    if seen.documents is not None:
        answer["documents"] = asdict(seen.documents)
    if html is not None:
        _write(answer, html)
    if as_json:
        common.answer(answer)
        return
    with common.answering():
        _show(answer)


def _show(answer: dict[str, Any]) -> None:
    from qlora.report import xray
    from qlora.report.console import Terminal

    plain = shown.plain_values(redact_all(answer), blocks=True)
    if plain["documents"] is not None:
        Terminal().print(xray.documents_view(plain["documents"]))
    if plain["study"] is not None:
        Terminal().print(xray.study_view(plain["study"]))
    if plain["rows"] is not None:
        xray.show(Terminal(), plain["rows"])


def _write(answer: dict[str, Any], html: Path) -> None:
    from qlora import disk
    from qlora.report.xray_page import page_of

    disk.write_atomic(html, page_of(answer))


if __name__ == "__main__":
    app()
