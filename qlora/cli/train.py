"""`qlora-train RECIPE`: a recipe in, an adapter (and what else the recipe asks for) out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli import common

if TYPE_CHECKING:
    from qlora.api import Checked

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a TOML file.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a key; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, bit for bit.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Keep an existing run as <name>.N and start anew.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Validate recipe, base and every row, then stop before training.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON Schema and stop.")] = False,
) -> None:
    """Train a LoRA adapter on a 4-bit base, as RECIPE says. The result is a folder under output.dir.

    Ctrl-C finishes the step, saves and exits; --resume goes on from there.
    """
    common.run(lambda: _run(recipe, set_ or [], resume, fresh, check, schema))


def _run(recipe: Path | None, overrides: list[str], resume: bool, fresh: bool, check: bool, schema: bool) -> None:
    from qlora.errors import Problem, RecipeError
    from qlora.recipe import load_recipe, recipe_schema

    if schema:
        print(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        hint = "for example qlora-train recipes/quickstart.toml"
        raise RecipeError([Problem("qlora-train", "no recipe given", hint)])
    if resume and fresh:
        hint = "--resume goes on with the run, --fresh starts anew beside it"
        raise RecipeError([Problem("qlora-train", "--resume and --fresh exclude each other", hint)])
    loaded = load_recipe(recipe, overrides)
    from qlora import api
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink
    from qlora.training.stop import StopRequest

    stop = StopRequest()
    sink = Sinks(*([ConsoleSink()] if check or "console" in loaded.report.sinks else []))
    mode: api.Mode = "resume" if resume else "fresh" if fresh else "new"
    with common.Signals(stop):
        try:
            if check:
                _report(api.check(loaded, sink=sink))
            else:
                api.train(loaded, name=recipe.stem, mode=mode, sink=sink, stop=stop)
        finally:
            sink.close()


def _report(checked: Checked) -> None:
    data, memory = checked.data, checked.memory
    for split, name in ((data.train, "train on"), (data.eval, "evaluate")):
        total, trained = sum(split.lengths), sum(split.trained)
        print(f"{len(split.lengths):,} rows to {name}: {total:,} tokens, {trained:,} trained")
    if memory is not None:
        gib = 2**30
        print(f"memory: {memory.peak_bytes / gib:.2f} GiB at its peak, the limit is {memory.limit_bytes / gib:.2f} GiB")
    print("recipe, base, tokenizer and rows are good")


if __name__ == "__main__":
    app()
