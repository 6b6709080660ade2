"""`qlora-export RUN_OR_ADAPTER --to hf|gguf|adapter-gguf`: the adapter merged into its base, written and verified."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora import shown
from qlora.cli import common
from qlora.recipe.sections import GGUF_QUANTS
from qlora.redaction import redact

if TYPE_CHECKING:
    from qlora.export.artifacts import ExportOptions, Report
    from qlora.export.combination import Combination

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Format(str, Enum):
    hf = "hf"
    gguf = "gguf"
    adapter_gguf = "adapter-gguf"
    adapter = "adapter"


Quant = Enum("Quant", {name: name for name in GGUF_QUANTS}, type=str)  # type: ignore[misc]


@app.command(cls=common.Command)
def export(
    source: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...",
            help="A run's folder, or a PEFT adapter folder; several of one base are combined by --weights.",
        ),
    ],
    to: Annotated[
        list[Format] | None,
        typer.Option(
            "--to",
            help="hf: safetensors with config and tokenizer. gguf: for llama.cpp, Ollama, LM Studio. adapter-gguf: the "
            "adapter alone, for llama.cpp's --lora. adapter: of several, the combined one for PEFT. Repeatable.",
            show_default="hf",
        ),
    ] = None,
    quant: Annotated[
        list[Quant] | None, typer.Option("--quant", help="Type of a GGUF; repeatable.", show_default="q8_0")
    ] = None,
    base: Annotated[
        Literal["auto", "nf4", "full"],
        typer.Option(
            "--base",
            help="nf4: merge into the base as training saw it, dequantized. full: into its original weights. auto: the "
            "one with the better loss on your evaluation rows, where they tell; else the nearer to the trained model.",
        ),
    ] = "auto",
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="The base's folder or hub name, where the adapter names another place.",
            metavar="PATH_OR_NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write.", show_default="<run>/export/<format>")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W…",
            help="Combine several adapters: how much of each, in their order, such as 0.7,0.3; negative: less of it.",
        ),
    ] = None,
    method: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] | None,
        typer.Option(
            "--method",
            help="How adapters are combined. linear: the exact sum of what they add. The others drop values first, as "
            "PEFT does it, and need one rank.",
            show_default="linear",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of values that such a method keeps.", show_default="0.5"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of what dare_linear and dare_ties drop.", show_default="0")
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reopen and measure what was written, before it gets its name.")
    ] = True,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", min=0.0, help="Mean KL in nats beyond which an export is an error.")
    ] = None,
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="Weigh the errors of K- and IQ-quants by the activations of your rows.")
    ] = False,
    dtype: Annotated[
        Literal["bf16", "f16", "f32"], typer.Option("--dtype", help="Type of the weights in safetensors.")
    ] = "bf16",
    tokenizer_pre: Annotated[
        str | None,
        typer.Option("--tokenizer-pre", help="llama.cpp's name of the pre-tokenizer, if it is not recognised."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written and measured as JSON.")] = False,
) -> None:
    """Dequantize the base, merge the adapter into it tensor by tensor, write the model and prove that it is the one.

    A folder appears under its name when all of it is written, reopened and measured. The memory of one tensor is
    enough, and no GPU is needed. A killed export goes on where it was when it is run again.
    """
    options = {"verify": check, "max_kl": max_kl, "imatrix": imatrix, "dtype": dtype, "tokenizer_pre": tokenizer_pre}
    formats, quants = [name.value for name in to or [Format.hf]], [name.value for name in quant or []]
    request = {"to": formats, "quants": quants, "merge_base": base, "base_model": base_model, "out": out}
    how = {"method": method, "density": density, "seed": seed}
    common.run(lambda: _run(source, {**request, "combine": _combination(weights, how)}, options, as_json))


def _combination(weights: str | None, how: dict[str, Any]) -> Combination | None:
    """What the options say of combining. Raises ExportError for one that says nothing without weights."""
    from qlora.errors import ExportError
    from qlora.export.combination import Combination, parse_weights

    given = {key: value for key, value in how.items() if value is not None}
    if weights is not None:
        return Combination(parse_weights(weights), **given)
    if given:
        what = f"`{next(iter(given))}` says how several adapters are combined, and there are no `weights`"
        raise ExportError(what, "add `weights`, such as 0.7,0.3, or leave it out")
    return None


def _run(source: list[Path], request: dict[str, Any], chosen: dict[str, Any], as_json: bool) -> None:
    from qlora import api
    from qlora.cli import cards
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopRequest

    options: ExportOptions = api.export_options(**chosen)
    stop = StopRequest()
    screen = common.Screen(None if as_json else ConsoleSink(), stop)
    with common.Signals(stop, screen):
        try:
            cards.settle(Sinks(screen))
            report = api.merge_and_export(source, options=options, sink=Sinks(screen), **request)
        finally:
            screen.close()
    if as_json:
        common.answer(_as_json(report))
        return
    for product in report.products:
        if product.set_aside:
            size = f"{product.set_aside_bytes / 2**20:,.1f} MiB"
            line = f"kept: {product.set_aside} ({size}), which had been changed since it was exported"
            common.tell(shown.one_line(redact(line)))


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
