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

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Format(str, Enum):
    hf = "hf"
    gguf = "gguf"
    adapter_gguf = "adapter-gguf"


Quant = Enum("Quant", {name: name for name in GGUF_QUANTS}, type=str)  # type: ignore[misc]


@app.command(cls=common.Command)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or a PEFT adapter folder.")],
    to: Annotated[
        list[Format] | None,
        typer.Option(
            "--to",
            help="hf: safetensors with config and tokenizer. gguf: for llama.cpp, Ollama, LM Studio. adapter-gguf: the "
            "adapter alone, for llama.cpp's --lora. Repeatable.",
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
    common.run(lambda: _run(source, request, options, as_json))


def _run(source: Path, request: dict[str, Any], chosen: dict[str, Any], as_json: bool) -> None:
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
