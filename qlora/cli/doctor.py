"""`qlora-doctor`: whether this machine can do what is asked of it, what lies in caches, and proofs on its own card."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora import files, nvidia, torch_build
from qlora.cli import card_trouble, cards, common, prove
from qlora.errors import UserError

if TYPE_CHECKING:
    from qlora.doctor.card import CardFacts
    from qlora.doctor.finding import Finding
    from qlora.doctor.machine import TerminalFacts
    from qlora.report.console import Terminal

CHILD = "qlora.cli.doctor_child"
RUNS = Path("runs")  # output.dir, where a recipe does not say
Device = Literal["cpu", "cuda"]
Cleared = Literal["tokens", "bases", "compiled", "reports", "unfinished", "set-aside", "all"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was found as JSON: without paths and names, to be attached.")
    ] = False,
    runs: Annotated[
        Path, typer.Option("--runs", metavar="FOLDER", help="Where runs lie, or will lie: output.dir of your recipes.")
    ] = RUNS,
    caches: Annotated[
        bool, typer.Option("--caches", help="List caches and what was set aside, with sizes, instead.")
    ] = False,
    clear: Annotated[
        Cleared | None,
        typer.Option("--clear", help="Remove what --caches lists of this kind, once you have agreed."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --clear: do not ask.")] = False,
    prove_it: Annotated[
        bool, typer.Option("--prove", help="Try each promise of this program here, in under ten minutes, instead.")
    ] = False,
    device: Annotated[
        Device | None, typer.Option("--device", help="With --prove: where; without it, a GPU if there is one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="With --prove: write hardware, versions and figures there as JSON."),
    ] = None,
) -> None:
    """Look at Python, packages, GPU, driver, 4 bit, disks, memory, the hub and the terminal: is this machine well?

    Each line is ok, a warning or an error, with the command that mends it. Exit code 0 with warnings, 2 with errors.
    What may crash (torch, bitsandbytes) is tried in a process of its own.
    """
    common.run(lambda: _run(as_json, runs, (caches, clear, yes), (prove_it, device, out)))


def _run(
    as_json: bool,
    runs: Path,
    about_caches: tuple[bool, Cleared | None, bool],
    about_proofs: tuple[bool, Device | None, Path | None],
) -> None:
    list_them, kind, yes = about_caches
    prove_it, device, out = about_proofs
    if (device or out) and not prove_it:
        raise UserError("--device and --out belong to --prove", "add it, or leave them out")
    if yes and kind is None:
        raise UserError("--yes belongs to --clear", "say what is to be cleared, or leave it out")
    if prove_it and (list_them or kind):
        raise UserError("--prove and --caches are two things", "ask for one after the other")
    if prove_it:
        _prove(device, out, as_json)
    elif list_them or kind:
        _caches(files.user_path(runs, "--runs"), kind, yes, as_json)
    else:  # the current folder may be gone, which is something to be found
        _examine(runs if runs == RUNS else files.user_path(runs, "--runs"), as_json)


def _prove(device: Device | None, out: Path | None, as_json: bool) -> None:
    try:
        prove.prove_here(device, out, as_json)
    except ImportError as error:
        hint = "qlora-doctor, without --prove, says what is broken and what mends it"
        raise UserError(f"nothing can be proved: {error}", hint) from error


def _examine(runs: Path, as_json: bool) -> None:
    from qlora.doctor import checkup, report
    from qlora.doctor.finding import Colour
    from qlora.report.console import Terminal
    from qlora.report.doctor import draw, verdict

    console = Terminal()
    found: list[Finding] = []
    progress = _Progress(console, console.is_live and not as_json)
    try:
        for finding in checkup.findings(card_facts, CHILD, _screen(console), runs, progress.begin):
            found.append(finding)
            if not as_json:
                progress.end()
                with common.answering():
                    draw(_as_options(finding), console)
    finally:
        progress.end()
    value = report.as_dict(found)
    if as_json:
        common.answer(value)
    else:
        with common.answering():
            console.print(verdict(value["count"]))
    if broken := [finding.name for finding in found if finding.colour == Colour.RED]:
        raise UserError(f"not well: {', '.join(broken)}", "do what is said with each of these, then look again")


class _Progress:
    """What is looked at, on a line that goes away; on a terminal alone."""

    def __init__(self, console: Terminal, is_drawn: bool) -> None:
        self.console, self.is_drawn = console, is_drawn
        self.shown = False

    def begin(self, name: str) -> None:
        if self.is_drawn:
            self.end()
            self.console.print(f"{name} …"[: self.console.width - 1], end="\r")
            self.shown = True

    def end(self) -> None:
        if self.shown:
            self.console.print(" " * min(40, self.console.width - 1), end="\r")
            self.shown = False


def _as_options(finding: Finding) -> Finding:
    return replace(finding, said=common.as_options(finding.said), mend=common.as_options(finding.mend))


def _screen(console: Terminal) -> TerminalFacts:
    from qlora.doctor.machine import TerminalFacts

    return TerminalFacts(console.is_terminal, console.width, console.color_system, console.encoding)


def card_facts() -> CardFacts:
    """What system and driver say of NVIDIA's cards, and the verdict on the driver. torch is not imported."""
    from qlora.doctor.card import CardFacts

    signs, build = nvidia.signs(), torch_build.installed()
    if not signs.of_a_card:
        return CardFacts(build, signs, is_hidden=cards.is_hidden())
    answer = nvidia.ask(signs)
    too_old = card_trouble.driver_too_old(build, answer) if build is not None else None
    held = nvidia.holders(signs.smi) if signs.smi is not None and answer.cards else {}
    return CardFacts(build, signs, answer, cards.is_hidden(), too_old, held)


# --- caches ----------------------------------------------------------------------------------------------------------


def _caches(runs: Path, kind: Cleared | None, yes: bool, as_json: bool) -> None:
    from qlora.doctor import caches, report
    from qlora.report.console import Terminal
    from qlora.report.doctor import draw_caches
    from qlora.report.figures import human_bytes

    places = caches.Places.usual(runs)
    entries = caches.listed(places)
    wanted = caches.CLEARED if kind == "all" else (kind,) if kind else ()
    console = Terminal()
    if not as_json:
        with common.answering():
            draw_caches(entries, console)
    going = [one for one in entries if one.kind in wanted and not one.stays]
    size = human_bytes(sum(one.bytes for one in going))
    if going and not (yes or _agreed(f"remove {len(going)} of these ({size})?")):
        raise UserError("nothing was removed", "agree, or give --yes")
    outcomes = list(caches.clear(places, entries, wanted))
    gone = [str(entry.path) for entry, why in outcomes if not why]
    if as_json:
        common.answer(report.caches_as_dict(entries, gone))
    elif kind:
        freed = human_bytes(sum(entry.bytes for entry, why in outcomes if not why))
        common.tell(f"removed {len(gone)} ({freed})")
    if stayed := [f"{entry.path} ({why})" for entry, why in outcomes if why]:
        raise UserError(
            f"not removed: {', '.join(stayed[:5])}", "look at what is listed, and remove by yourself what is yours"
        )


def _agreed(question: str) -> bool:
    """Whether the person at the terminal says yes; nobody is there to be asked in a pipe."""
    if not is_answered():
        raise UserError(f"{question} nobody can be asked here", "give --yes to remove them without being asked")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline(16).strip().lower() in ("y", "yes")


def is_answered() -> bool:
    return sys.stdin.isatty()


if __name__ == "__main__":
    app()
