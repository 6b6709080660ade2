"""`qlora-export RUN_OR_ADAPTER --to hf|gguf|adapter-gguf`: merged into its base, written, verified, and pushed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora import shown
from qlora.cli import common
from qlora.errors import ExportError
from qlora.recipe.sections import GGUF_QUANTS
from qlora.redaction import redact

if TYPE_CHECKING:
    from qlora.export.artifacts import ExportOptions, Report
    from qlora.export.combination import Combination
    from qlora.export.push import Push

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Format(str, Enum):
    hf = "hf"
    gguf = "gguf"
    adapter_gguf = "adapter-gguf"
    adapter = "adapter"


Quant = Enum("Quant", {name: name for name in GGUF_QUANTS}, type=str)  # type: ignore[misc]


# The options, each with what `--help` says of it.
Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN_OR_ADAPTER...",
        help="A run's folder, or a PEFT adapter folder; several of one base are combined by --weights. With --push "
        "also exports.",
    ),
]
To = Annotated[
    list[Format] | None,
    typer.Option(
        "--to",
        help="hf: safetensors with config and tokenizer. gguf: for llama.cpp, Ollama, LM Studio. adapter-gguf: the "
        "adapter alone, for llama.cpp's --lora. adapter: of several, the combined one for PEFT. Repeatable.",
        show_default="hf",
    ),
]
Quants = Annotated[list[Quant] | None, typer.Option("--quant", help="Type of a GGUF; repeatable.", show_default="q8_0")]
Base = Annotated[
    Literal["auto", "nf4", "full"],
    typer.Option(
        "--base",
        help="nf4: merge into the base as training saw it, dequantized. full: into its original weights. auto: the "
        "one with the better loss on your evaluation rows, where they tell; else the nearer to the trained model.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        help="The base's folder or hub name, where the adapter names another place.",
        metavar="PATH_OR_NAME",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.", show_default="<run>/export/<format>")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="W,W…",
        help="Combine several adapters: how much of each, in their order, such as 0.7,0.3; negative: less of it.",
    ),
]
Method = Annotated[
    Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] | None,
    typer.Option(
        "--method",
        help="How adapters are combined. linear: the exact sum of what they add. The others drop values first, as "
        "PEFT does it, and need one rank.",
        show_default="linear",
    ),
]
Density = Annotated[
    float | None,
    typer.Option("--density", help="Share of values that such a method keeps.", show_default="0.5"),
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Of what dare_linear and dare_ties drop.", show_default="0")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Reopen and measure what was written, before it gets its name.")
]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", min=0.0, help="Mean KL in nats beyond which an export is an error.")
]
Importance = Annotated[
    bool, typer.Option("--imatrix", help="Weigh the errors of K- and IQ-quants by the activations of your rows.")
]
Dtype = Annotated[Literal["bf16", "f16", "f32"], typer.Option("--dtype", help="Type of the weights in safetensors.")]
TokenizerPre = Annotated[
    str | None,
    typer.Option("--tokenizer-pre", help="llama.cpp's name of the pre-tokenizer, if it is not recognised."),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="NAME",
        help="Send what is exported to this repository of the hub: owner/name, or a name of your own. Private. "
        "Also exports that are there: name their folders. With --to adapter, a run's adapter.",
    ),
]
Public = Annotated[
    bool, typer.Option("--public", help="Push to a repository that everybody may read; you are asked first.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Say yes to what a push would ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was written and measured as JSON.")]


@app.command(cls=common.Command)
def export(
    source: Sources,
    to: To = None,
    quant: Quants = None,
    base: Base = "auto",
    base_model: BaseModel = None,
    out: Out = None,
    weights: Weights = None,
    method: Method = None,
    density: Density = None,
    seed: Seed = None,
    check: Verify = True,
    max_kl: MaxKl = None,
    imatrix: Importance = False,
    dtype: Dtype = "bf16",
    tokenizer_pre: TokenizerPre = None,
    push: PushTo = None,
    public: Public = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Dequantize the base, merge the adapter into it tensor by tensor, write the model and prove that it is the one.

    A folder appears under its name when all of it is written, reopened and measured. The memory of one tensor is
    enough, and no GPU is needed. A killed export goes on where it was when it is run again.
    """
    options = {"verify": check, "max_kl": max_kl, "imatrix": imatrix, "dtype": dtype, "tokenizer_pre": tokenizer_pre}
    formats, quants = [name.value for name in to or []], [name.value for name in quant or []]
    request = {"to": formats, "quants": quants, "merge_base": base, "base_model": base_model, "out": out}
    how = {"method": method, "density": density, "seed": seed}
    destination = {"push": push, "public": public, "yes": yes}
    common.run(
        lambda: _run(source, {**request, "combine": _combination(weights, how), **destination}, options, as_json)
    )


def _combination(weights: str | None, how: dict[str, Any]) -> Combination | None:
    """What the options say of combining. Raises ExportError for one that says nothing without weights."""
    from qlora.export.combination import Combination, parse_weights

    given = {key: value for key, value in how.items() if value is not None}
    if weights is not None:
        return Combination(parse_weights(weights), **given)
    if given:
        what = f"`{next(iter(given))}` says how several adapters are combined, and there are no `weights`"
        raise ExportError(what, "add `weights`, such as 0.7,0.3, or leave it out")
    return None


def _run(source: list[Path], request: dict[str, Any], chosen: dict[str, Any], as_json: bool) -> None:
    from qlora.hub import check_pushable

    public, yes, name = (request.pop(key, None) for key in ("public", "yes", "push"))
    if name is not None:
        check_pushable(name)  # before anything large is imported
    elif public or yes:
        raise ExportError("`public` and `yes` are for a push", "add `push` with the repository's name")

    from qlora import api, pushing
    from qlora.cli import cards
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopRequest

    stop = StopRequest()
    screen = common.Screen(None if as_json else ConsoleSink(), stop)
    with common.Signals(stop, screen):
        try:
            push = None if name is None else _push(name, bool(public), bool(yes))
            if push is not None and pushing.are_exports(source):
                _refuse_options({**request, **chosen})
                pushed, report = pushing.push_exports(source, push, sink=Sinks(screen)), None
            else:
                cards.settle(Sinks(screen))
                request["to"] = request.get("to") or ["hf"]
                options: ExportOptions = api.export_options(**chosen)
                report = api.merge_and_export(source, options=options, push=push, sink=Sinks(screen), **request)
                pushed = report.pushed
        finally:
            screen.close()
    if as_json:
        told = {"push": None if pushed is None else asdict(pushed)}
        common.answer(told if report is None else {**_as_json(report), **told})
        return
    for product in report.products if report is not None else ():
        if product.set_aside:
            size = f"{product.set_aside_bytes / 2**20:,.1f} MiB"
            line = f"kept: {product.set_aside} ({size}), which had been changed since it was exported"
            common.tell(shown.one_line(redact(line)))


def _push(name: str, public: bool, yes: bool) -> Push:
    """Where to; a person at the terminal is asked, unless all is agreed to already."""
    from qlora.export.push import Push

    ask = (lambda _: True) if yes else common.agreed if sys.stdin.isatty() else None
    return Push(name, public, ask)


# What stands where an option was left out.
_UNSET: tuple[Any, ...] = (None, False, [], "auto", "bf16")


def _refuse_options(given: dict[str, Any]) -> None:
    """An option must not be a silent nothing: exports that are there are pushed as they are."""
    odd = [key for key, value in given.items() if value not in _UNSET and (key, value) != ("verify", True)]
    odd += ["verify"] if given.get("verify") is False else []
    if odd:
        hint = "leave it out, or name the run or adapter to export it anew"
        raise ExportError(f"an export is pushed as it is, and `{odd[0]}` is of one that is made", hint)


def _as_json(report: Report) -> dict[str, Any]:
    products = [{**asdict(product), "folder": str(product.folder)} for product in report.products]
    checks = [dict(zip(("format", "check", "ok", "detail"), check, strict=True)) for check in report.checks]
    fidelity = [asdict(line) for line in report.fidelity]
    choice = None if report.choice is None else asdict(report.choice)
    content = {
        "merge_base": report.merge_base,
        "choice": choice,
        "products": products,
        "fidelity": fidelity,
        "checks": checks,
    }
    return {**content, "evaluation": None if report.evaluation is None else asdict(report.evaluation)}


if __name__ == "__main__":
    app()
