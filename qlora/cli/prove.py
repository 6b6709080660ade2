"""`python -m qlora.prove`: each promise of this program, tried on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora import files
from qlora.cli import common

if TYPE_CHECKING:
    from qlora.prove.proof import Proof

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def prove(
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--device", help="Where to try it; without it, a GPU if there is one."),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write hardware, versions and figures there as JSON.")
    ] = None,
    model: Annotated[
        Literal["8b", "3b", "1b", "small", "mini"] | None,
        typer.Option("--model", help="Shape of the random model; without it, the largest that fits (a CPU: small)."),
    ] = None,
) -> None:
    """Try on this machine what this program promises, in under ten minutes, with a random model made on the spot.

    Memory said against memory measured, tokens a second, a killed run that goes on bit for bit, each way to compute
    attention and updates against the plain one, exports. Exit code 0 when all is as promised, 4 when something is not.
    """
    common.run(lambda: _run(device, as_json, model))


def _run(device: str | None, file: Path | None, model: str | None) -> None:
    found = _found(device, file, model, _begin)
    with common.answering():
        _show(found)
    _refuse_broken(found)


def prove_here(device: str | None, file: Path | None, as_json: bool) -> None:
    """As `qlora-doctor` asks for it: what a card shows is kept where estimates read it. Raises as the command does."""
    from qlora.memory import calibration

    found = _found(device, file, None, begin=_begin if not as_json else lambda _: None)
    kept = calibration.keep(found)
    if as_json:
        common.answer(found)
    else:
        with common.answering():
            _show(found)
        if kept is not None:
            common.tell(f"estimates for this card are corrected by it from now on: {kept}")
    _refuse_broken(found)


def _found(device: str | None, file: Path | None, model: str | None, begin: Callable[[Proof], None]) -> dict[str, Any]:
    """What the proofs found, written to `file` where one is named."""
    if device == "cpu":
        # Before torch is imported: runs take the GPU that they see. On Windows an empty value would unset it.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    from qlora import determinism, disk
    from qlora.cli import cards
    from qlora.events import Sinks
    from qlora.prove import report, suite
    from qlora.stop import StopRequest

    target = None if file is None else _place_for(file)  # before ten minutes of work
    if device != "cpu":
        determinism.fix_workspace()
        cards.settle(Sinks())
    stop = StopRequest()
    with common.Signals(stop, common.Screen(None, stop)), suite.place_for(device, model) as place:
        found = report.as_dict(place, suite.run_all(place, begin=begin))
    if target is not None:
        with disk.open_to_write(target, "replace") as stream:
            stream.write((json.dumps(found, indent=1) + "\n").encode())
    return found


def _place_for(file: Path) -> Path:
    """Where the proofs can be written: nothing is there, or what was written so before. Raises UserError."""
    from qlora import disk, foreign_json
    from qlora.errors import UserError

    target = files.user_path(file, "`json`")
    if not target.parent.is_dir():
        raise UserError(f"`json`: {target.parent}: no such folder", "make it, or name a file in another one")
    disk.check_writable(target.parent)
    if why := files.unreachable(target):
        raise UserError(f"`json`: {target}: {why}", "name another file")
    if os.path.lexists(target):
        with suppress(foreign_json.ForeignFileError):
            if {"format", "proofs"} <= foreign_json.load_object(target).keys():
                return target
        raise UserError(f"`json`: {target} is there, and holds no proofs of ours", "name another file, or remove it")
    return target


def _refuse_broken(found: dict[str, Any]) -> None:
    """Raises TrainingStopped, exit code 4, where something is not as promised."""
    from qlora.errors import TrainingStopped
    from qlora.prove.report import BROKEN

    broken = [proof["name"] for proof in found["proofs"] if proof["outcome"] == BROKEN]
    if broken:
        raise TrainingStopped(
            f"not as promised on {found['hardware']['device']}: {', '.join(broken)}",
            "please report it with the file that --json FILE writes: it names nobody",
        )


def _begin(proof: Proof) -> None:
    common.tell(f"{proof.name}: {proof.promise}")


def _show(found: dict[str, Any]) -> None:
    from qlora.report.console import Terminal
    from qlora.report.proofs import proofs_view

    Terminal().print(proofs_view(found))


if __name__ == "__main__":
    app()
