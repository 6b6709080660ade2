"""`qlora-estimate RECIPE_OR_MODEL`: the peak memory of a run, before anything is loaded, and settings that fit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from qlora import shown
from qlora.cli import common, multi_gpu_estimate
from qlora.collections_off import without_collections
from qlora.redaction import redact_all

if TYPE_CHECKING:
    from qlora.memory.hardware import RunCard

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

PLOT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@app.command(cls=common.Command)
def estimate(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_MODEL", help="A recipe, a hub name, or a folder.")],
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help='A card, such as "RTX 4090"; again, or "2x 3090", for several.'),
    ] = None,
    vram: Annotated[
        list[str] | None,
        typer.Option("--vram", metavar="SIZE", help="A size, such as 8GiB; again, or 2x24GB, for several cards."),
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Search settings that fit, and print the recipe change.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Draw where the peak stands, layer by layer, and what changes would save.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a key; repeatable.")
    ] = None,
    stack: Annotated[
        Literal["qlora", "plain", "torchtune"],
        typer.Option("--stack", help="How another trainer would do it, for comparison."),
    ] = "qlora",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the peak against the length of rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Predict the peak memory of training, part by part, from config.json alone.

    Without --gpu or --vram the limit is the recipe's memory.limit, or what this machine has free. Exit code 3 when it
    does not fit.
    """
    asked = {"gpu": gpu or [], "vram": vram or [], "stack": stack}
    wanted = _Wanted(fit, explain, plot, as_json)
    with without_collections():  # the command ends before cycles would matter; a simulation looks for its own
        common.run(lambda: _run(what, set_ or [], asked, wanted))


class _Wanted(NamedTuple):
    """What is asked beside the estimate, and in which form it is answered."""

    fit: bool
    explain: bool
    plot: Path | None
    as_json: bool


def _run(what: str, overrides: list[str], asked: dict[str, Any], wanted: _Wanted) -> None:
    if cards := _refuse_early(asked, wanted):
        return multi_gpu_estimate.run(what, overrides, cards, wanted.fit, wanted.as_json)
    one = {name: next(iter(asked[name]), None) for name in ("gpu", "vram")}
    unusable = _unusable_card() if one == {"gpu": None, "vram": None} else None
    from qlora import api

    question = api.question(api.recipe_or_model(what, overrides), **one, stack=asked["stack"])
    if wanted.plot is not None:
        _plot(question, wanted.plot)
    plans = question.search() if wanted.fit else []
    plan = plans[0] if plans else question.decided()
    estimate = plan.estimate
    answer = {**estimate.as_dict(), "limit_source": estimate.limit_source}
    if question.documents is not None and asked["stack"] == "qlora":
        answer["hours"] = _hours(question)
    if unusable:
        answer["notes"].append(f"{unusable}: this is the estimate of a run on the CPU")
    answer["reasons"] = dict(plan.reasons)
    if wanted.explain:
        answer["explained"] = question.explain(plan).as_dict()
    if wanted.fit:
        answer["plans"] = [_as_dict(plan) for plan in plans]
    if wanted.as_json:
        common.answer(answer)
    else:
        with common.answering():
            _show(answer)
    if not estimate.fits:
        raise question.does_not_fit()


def _refuse_early(asked: dict[str, Any], wanted: _Wanted) -> tuple[RunCard, ...]:
    """What needs no model to be wrong is refused before anything slow is imported. The cards, where several are asked
    about."""
    from qlora.errors import Problem, RecipeError
    from qlora.memory.hardware import asked_cards

    cards = asked_cards(asked["gpu"], asked["vram"])
    if wanted.plot is not None:
        from qlora.report.picture import check_place

        check_place(wanted.plot)
    if len(cards) < 2:
        return ()
    if asked["gpu"] and asked["vram"]:
        raise RecipeError([Problem("qlora-estimate", "`gpu` and `vram` both name the limit", "give one of them")])
    of_one = {"--plot": wanted.plot is not None, "--explain": wanted.explain, "--stack": asked["stack"] != "qlora"}
    if flags := [flag for flag, given in of_one.items() if given]:
        problem = f"{' and '.join(flags)}: of one card, and {len(cards)} are asked about"
        raise RecipeError([Problem("qlora-estimate", problem, "name one card, or leave that out")])
    return cards


def _unusable_card() -> str | None:
    """What is wrong with this machine's GPU, which a run would refuse to start on."""
    from qlora.cli import cards
    from qlora.errors import HardwareError
    from qlora.events import Recorder

    try:
        cards.settle(Recorder())
    except HardwareError as error:
        return error.what
    return None


def _hours(question: Any) -> dict[str, Any]:
    from qlora import hours
    from qlora.study import defaults

    decides = not defaults.has_length(question.recipe)
    return asdict(hours.hours_of(question.recipe, question.documents, decides, question.estimator))


def _as_dict(plan: Any) -> dict[str, Any]:
    from qlora.memory.changes import toml_value

    lines = [f"{key} = {toml_value(value)}" for key, value in plan.changes.items()]
    return {
        "changes": dict(plan.changes),
        "lines": lines,
        "reasons": dict(plan.reasons),
        "estimate": plan.estimate.as_dict(),
    }


def _show(answer: dict[str, Any]) -> None:
    from qlora.report.ahead import hours_line
    from qlora.report.console import Terminal
    from qlora.report.explained import explained_view
    from qlora.report.memory import estimate_view, plans_view

    console = Terminal()
    answer = shown.plain_values(redact_all(answer))
    console.print(estimate_view(answer))
    if explained := answer.get("explained"):
        console.print("")
        console.print(explained_view(explained, answer["limit_bytes"]))
    if hours := answer.get("hours"):
        console.print(f"\n{hours_line(hours)}", soft_wrap=True)
    if plans := answer.get("plans"):
        console.print("\nsettings that fit, the fastest first")
        console.print(plans_view(plans))
        if plans[0]["lines"]:
            console.print("\nchange the recipe to")
            for line in _toml(plans[0]["lines"]):
                console.print(f"  {line}", soft_wrap=True)


def _toml(lines: list[str]) -> list[str]:
    """`table.key = value` lines as a recipe has them, under their tables."""
    tables: dict[str, list[str]] = {}
    for line in lines:
        table, _, rest = line.partition(".")
        tables.setdefault(table, []).append(rest)
    return [text for table, rests in tables.items() for text in (f"[{table}]", *rests)]


def _plot(question: Any, file: Path) -> None:
    from qlora.memory.hardware import common_cards
    from qlora.report.picture import draw_lengths

    # One setting for all lengths: where "auto" recomputes only some of them, the line would fall at the next length.
    train = question.recipe.train
    least = {"train.micro_batch_size": 1, "train.gradient_checkpointing": True}
    fixed = {key: value for key, value in least.items() if getattr(train, key.partition(".")[2]) == "auto"}
    estimates = {length: question.estimate({"data.max_length": length, **fixed}) for length in PLOT_LENGTHS}
    title = f"{question.title}, layers recomputed" if "train.gradient_checkpointing" in fixed else question.title
    peaks = {length: (estimate.peak_bytes, estimate.error_bytes) for length, estimate in estimates.items()}
    machine, most = question.machine, 1.2 * max(map(sum, peaks.values()))
    near = 0.03 * most  # where two lines' names would lie on each other
    others = {
        name: limit
        for name, limit in common_cards().items()
        if limit < most and abs(limit - machine.limit_bytes) > near
    }
    asked = (f"{machine.source} ({machine.limit_bytes / 2**30:.2f} GiB)", machine.limit_bytes)
    draw_lengths(peaks, asked, others, title, file)


if __name__ == "__main__":
    app()
