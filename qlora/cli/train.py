"""`qlora-train RECIPE`: a recipe in, an adapter (and what else the recipe asks for) out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora import files, processes, shown
from qlora.cli import common, recipes
from qlora.redaction import redact

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
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
    verify_resume: Annotated[
        bool,
        typer.Option("--verify-resume", help="Prove in a few steps that a resumed run equals an uninterrupted one."),
    ] = False,
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--rewards",
            metavar="FILE.py:FUNCTION",
            help="For grpo: a Python function that judges answers; repeatable, and given again with --resume.",
        ),
    ] = None,
    new: Annotated[
        Path | None,
        typer.Option("--new", metavar="NAME.toml", help="Write a first recipe that fits --base and --data, and stop."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="BASE", help="With --new: hub name or folder.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="With --new: rows, as [[data.train]] names them.")
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option(
            "--import",
            metavar="FILE",
            help="Make a recipe (its name: --new) of a configuration of axolotl, LLaMA-Factory, Unsloth Studio or TRL.",
        ),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON Schema and stop.")] = False,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print keys, formats and options as a page of Markdown and stop.")
    ] = False,
) -> None:
    """Train a LoRA adapter on a 4-bit base, as RECIPE says. The result is a folder under output.dir.

    Ctrl-C finishes the micro-batch, saves and exits; --resume goes on from there.
    """
    wanted = [
        name
        for name, given in (("resume", resume), ("fresh", fresh), ("check", check), ("verify-resume", verify_resume))
        if given
    ]
    if schema or keys:
        common.run(lambda: _answer(_schema() if schema else _keys()))
    elif import_ is not None:
        common.run(lambda: recipes.import_recipe(import_, new))
    elif new is not None or base is not None or data is not None:
        common.run(lambda: recipes.first_recipe(new, base, data))
    else:
        common.run(lambda: _run(recipe, set_ or [], wanted, rewards or []))


def _answer(text: str) -> None:
    with common.answering():
        print(text)


def _schema() -> str:
    from qlora.recipe.reading import recipe_schema

    return json.dumps(recipe_schema(), indent=2)


def _keys() -> str:
    from qlora.cli import chat, data, doctor, estimate, evaluate, exam, export, report
    from qlora.cli.keys import page

    return page(
        {
            "qlora-train": train,
            "qlora-export": export.export,
            "qlora-estimate": estimate.estimate,
            "qlora-data": data.data,
            "qlora-exam": exam.exam,
            "qlora-eval": evaluate.evaluate,
            "qlora-chat": chat.chat,
            "qlora-report": report.report,
            "qlora-doctor": doctor.doctor,
        }
    )


def _run(recipe: Path | None, overrides: list[str], wanted: list[str], rewards: list[str]) -> None:
    """`wanted` holds at most one of: resume, fresh, check, verify-resume."""
    from qlora.errors import Problem, RecipeError
    from qlora.stop import StopRequest

    if recipe is None:
        hint = "for example qlora-train recipes/quickstart.toml"
        raise RecipeError([Problem("qlora-train", "no recipe given", hint)])
    if len(wanted) > 1:
        flags = " and ".join(f"--{name}" for name in wanted)
        hint = "--resume goes on with the run, --fresh starts anew beside it; give one of them"
        raise RecipeError([Problem("qlora-train", f"{flags} exclude each other", hint)])
    stop = StopRequest()
    screen = common.Screen(None, stop)
    with common.Signals(stop, screen):
        try:
            last = _work(recipe, overrides, (wanted[0] if wanted else "new", rewards), screen)
        finally:
            screen.close()
    if last:
        common.tell(shown.one_line(redact(last)))


Wanted = tuple[str, list[str]]  # what is to be done, and the functions that judge answers


def _work(path: Path, overrides: list[str], asked: Wanted, screen: common.Screen) -> str | None:
    """Do what is wanted. Returns a line to be said when the screen is closed."""
    if (place := processes.launched()).size == 1:
        return _lead(path, overrides, asked, screen)
    from qlora.cli import together

    with together.joined(place, asked[0], screen.stop) as first:
        return _lead(path, overrides, asked, screen) if first else None


def _lead(path: Path, overrides: list[str], asked: Wanted, screen: common.Screen) -> str | None:
    """`_work` of the only process, or of the first of several."""
    from qlora.recipe.reading import load_recipe

    last, (wanted, rewards) = None, asked
    files.user_path(path, "the recipe")
    loaded = load_recipe(path, overrides)
    from qlora import api, determinism
    from qlora.cli import cards, together
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink

    if wanted in ("check", "verify-resume") or "console" in loaded.report.sinks:
        screen.inner = ConsoleSink()
    sink = Sinks(screen)
    if loaded.train.deterministic:
        determinism.fix_workspace()
    together.refuse_unbuilt(loaded)
    if processes.of_run().size == 1:  # else every process has done so
        cards.settle(sink)
    if wanted == "check":
        common.tell(*api.check(loaded, sink=sink, rewards=rewards).lines())
    elif wanted == "verify-resume":
        from qlora.cli.verify_resume import verify_resume

        common.tell(str(verify_resume(loaded, path.stem, sink, rewards)))
    else:
        mode: api.Mode = "resume" if wanted == "resume" else "fresh" if wanted == "fresh" else "new"
        result = api.train(loaded, mode=mode, sink=sink, stop=screen.stop, name=path.stem, rewards=rewards)
        if aside := result.set_aside:
            last = f"kept: {aside.folder} ({aside.bytes / 2**20:,.1f} MiB), the run that was here before"
    return last


if __name__ == "__main__":
    app()
