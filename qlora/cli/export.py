"""`qlora-export RUN_OR_ADAPTER --to hf`: the adapter merged into its base, as a model like any other."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli import common

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Format(str, Enum):
    hf = "hf"


class Base(str, Enum):
    auto = "auto"
    nf4 = "nf4"
    full = "full"


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or a PEFT adapter folder.")],
    to: Annotated[Format, typer.Option("--to", help="hf: safetensors shards with config and tokenizer.")] = Format.hf,
    base: Annotated[
        Base,
        typer.Option(
            "--base",
            help="nf4: the base as training saw it, dequantized. full: its original weights. "
            "auto: nf4 when the adapter was trained on a quantized base.",
        ),
    ] = Base.auto,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write.", show_default="<run>/export/hf")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Dequantize the base, merge the adapter into it tensor by tensor, and write the whole model.

    The folder appears under its name when all of it is written and reopened. CPU memory of one tensor is enough.
    """
    common.run(lambda: _run(source, to, base, out, as_json))


def _run(source: Path, to: Format, base: Base, out: Path | None, as_json: bool) -> None:
    from qlora import api
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink, human_bytes
    from qlora.training.stop import StopRequest

    stop = StopRequest()
    screen = common.Screen(None if as_json else ConsoleSink(), stop)
    with common.Signals(stop, screen):
        try:
            done = api.merge_and_export(source, to=to.value, merge_base=base.value, out=out, sink=Sinks(screen))
        finally:
            screen.close()
    if as_json:
        values = {"format": done.format, "folder": str(done.folder), "bytes": done.bytes, "tensors": done.tensors}
        print(json.dumps({**values, "merged_modules": done.merged_modules, "base": done.merge_base}))
    else:
        merged = f"{done.merged_modules} of {done.tensors} tensors merged, base {done.merge_base}"
        print(f"{done.folder}: {human_bytes(done.bytes)}, {merged}")


if __name__ == "__main__":
    app()
