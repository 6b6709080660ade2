"""All checks, one after the other: each bounded in time and alone with its faults, so that none ends the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from qlora import hub
from qlora.doctor import card, machine, places, reach, requirements, tried
from qlora.doctor.caches import hub_folder, temporary_folder
from qlora.doctor.card import CardFacts
from qlora.doctor.finding import Check, Finding, red, yellow
from qlora.doctor.machine import TerminalFacts
from qlora.doctor.stages import STAGES
from qlora.doctor.trial import Trial, attempt
from qlora.errors import QloraError, foreign_failures, one_line

T = TypeVar("T")
NETWORK_SECONDS = 4.0  # of each wait; a name that is looked up, a connection and an answer are three
DRIVER_SECONDS = 45.0  # it is asked up to four times for ten seconds each (nvidia.py)


def findings(
    facts: Callable[[], CardFacts],
    module: str,
    screen: TerminalFacts,
    runs: Path,
    begin: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Every line, as soon as it is known; `begin` is told what is looked at before it is.

    `facts` asks the driver, `module` serves `STAGES` in a process of its own: both belong to the commands, which know
    which card is chosen.
    """
    known: list[requirements.Installed | None] = []
    yield from bounded(Check("packages", 10, partial(_keep, known, requirements.read)))
    installed = known[0] if known else None
    yield from _each(
        [
            Check("Python", 10, lambda: [requirements.python(installed)]),
            Check("packages", 10, lambda: requirements.of_packages(installed)),
            Check("system", 10, machine.system),
            Check("RAM", 10, machine.memory),
        ],
        begin,
    )
    begin("GPU")
    asked: list[CardFacts] = []
    yield from bounded(Check("driver", DRIVER_SECONDS, partial(_keep, asked, facts)))
    trials = _trials(module, begin)
    yield from bounded(Check("GPU", 10, lambda: card.findings(asked[0] if asked else CardFacts(), trials["device"])))
    yield from bounded(Check("libraries", 10, lambda: tried.findings(trials, installed)))
    begin("disks")
    where: list[Sequence[places.Place]] = []
    yield from bounded(
        Check("disks", 10, partial(_keep, where, lambda: places.usual(runs, hub_folder(), temporary_folder())))
    )
    for place in chain.from_iterable(where):
        yield from bounded(Check(f"disk: {place.what}", 20, partial(places.findings, place)))
    last = [
        Check("hub", 4 * NETWORK_SECONDS, lambda: reach.findings(hub.reach(NETWORK_SECONDS))),
        Check("terminal", 5, lambda: [machine.terminal(screen)]),
    ]
    yield from _each(last, begin)


def _trials(module: str, begin: Callable[[str], None]) -> dict[str, Trial]:
    """What came of each stage, also where no process can be started at all (no file may be opened any more)."""
    found: dict[str, Trial] = {}
    with foreign_failures(trial=True) as failure:
        found.update((trial.stage, trial) for trial in attempt(module, STAGES, begin))
    why = failure.reason if failure.error else "it was not tried"
    return {stage: found.get(stage) or Trial(stage, failure=why) for stage in STAGES}


def _keep(found: list[T], look: Callable[[], T]) -> tuple[Finding, ...]:
    """A look whose facts go on to other checks: it finds nothing by itself."""
    found.append(look())
    return ()


def _each(checks: Sequence[Check], begin: Callable[[str], None]) -> Iterator[Finding]:
    for check in checks:
        begin(check.name)
        yield from bounded(check)


def bounded(check: Check) -> list[Finding]:
    """What a check finds, or that it broke, or that it did not end in time: then its thread is left behind."""
    found: list[Finding] = []
    done = threading.Event()

    def work() -> None:
        try:
            found.extend(_guarded(check))
        finally:
            done.set()

    threading.Thread(target=work, name=check.name, daemon=True).start()
    if not done.wait(check.seconds):
        said = f"it did not answer within {check.seconds:.0f} seconds"
        return [yellow(check.name, said, "see whether a disk or a device hangs (a network disk that is gone does)")]
    return [_shown(one) for one in found]


def _guarded(check: Check) -> Sequence[Finding]:
    try:
        with foreign_failures(trial=True) as failure:
            return check.run()
    except QloraError as error:
        return [red(check.name, error.what, error.hint)]
    name = type(failure.error).__name__
    missing = getattr(failure.error, "name", None) if name == "ModuleNotFoundError" else None
    if missing:
        return [red(check.name, f"{missing} is not installed", f"pip install {str(missing).partition('.')[0]}")]
    return [red(check.name, f"the check failed ({name}: {failure.reason})", "see what it names")]


def _shown(one: Finding) -> Finding:
    """One line each, without control characters; secrets are taken out where it is drawn and where it is written."""
    return replace(one, said=one_line(one.said), mend=one_line(one.mend), here=one_line(one.here))
