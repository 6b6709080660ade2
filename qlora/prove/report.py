"""What proofs found, as one JSON value: hardware and versions, no path and no name of a person or machine."""

from __future__ import annotations

import getpass
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora import device as hardware
from qlora import run_folder, shown
from qlora.prove.proof import Place
from qlora.prove.suite import Result
from qlora.redaction import redact_all

FORMAT = 1
HELD, BROKEN, NOT_HERE = "held", "broken", "not here"
_PROCESSOR = re.compile(r"^model name\s*:\s*(.{1,100})$", re.MULTILINE)
_PATH = re.compile(r"[A-Za-z]:\\[^\s,;:]+|(?<![\w.…])/[\w.@+~-]+(?:/[\w.@+~-]*)+")


def outcome_of(result: Result) -> str:
    return NOT_HERE if result.outcome.holds is None else HELD if result.outcome.holds else BROKEN


def as_dict(place: Place, results: Sequence[Result]) -> dict[str, Any]:
    """Ready for `json.dumps`. What errors quote goes through `anonymous` first."""
    proofs = [
        {
            "name": result.proof.name,
            "promise": result.proof.promise,
            "tolerance": result.proof.tolerance,
            "source": result.proof.source,
            "outcome": outcome_of(result),
            "said": result.outcome.said,
            "measured": dict(result.outcome.measured),
            "seconds": round(result.seconds, 2),
        }
        for result in results
    ]
    count = {kind: sum(proof["outcome"] == kind for proof in proofs) for kind in (HELD, BROKEN, NOT_HERE)}
    whole = {
        "format": FORMAT,
        "hardware": hardware_facts(place),
        "versions": run_folder.versions(),
        "model": {"shape": place.shape.name, "rows": place.rows, "length": place.length},
        "seconds": round(sum(result.seconds for result in results), 1),
        "outcomes": count,
        "proofs": proofs,
    }
    return _each_text(shown.plain_values(redact_all(whole)))  # type: ignore[no-any-return]


def hardware_facts(place: Place) -> dict[str, Any]:
    """What the numbers were measured on. A laptop's card is not its desktop namesake: the driver's name says so."""
    import psutil
    import torch

    facts: dict[str, Any] = {"device": hardware.name_of(place.device), "system": platform.system()}
    facts |= {"machine": platform.machine(), "python": platform.python_version(), "threads": torch.get_num_threads()}
    facts |= {"processor": _processor(), "ram_bytes": int(psutil.virtual_memory().total)}
    facts["cuda"] = torch.version.cuda
    if place.on_card:
        card = hardware.card()
        facts["capability"] = ".".join(map(str, hardware.capability(place.device)))
        facts["laptop"] = "laptop" in str(facts["device"]).lower()
        facts["total_bytes"] = card.total_bytes if card else None
        facts["free_bytes"] = card.free_bytes if card else None
    return facts


def anonymous(text: str) -> str:
    """The text without paths, and without the names of this user, machine and home."""
    text = _PATH.sub("…", text)
    for word in _names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", "…", text)
    return text


def _names() -> Iterator[str]:
    """Longer ones first: a home is in other paths, and a user's name in the home."""
    found = {tempfile.gettempdir(), platform.node(), platform.node().partition(".")[0]}
    with suppress(RuntimeError):
        found.add(str(Path.home()))
    with suppress(OSError, KeyError, ImportError):  # as `surroundings` has it: a user id without a name
        found.add(getpass.getuser())
    found |= {os.environ.get(name, "") for name in ("HOME", "USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME")}
    yield from sorted((name for name in found if len(name) > 2), key=len, reverse=True)


def _each_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(inner) for inner in value]
    return anonymous(value) if isinstance(value, str) else value


def _processor() -> str:
    try:
        found = _PROCESSOR.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    return found[1] if found else platform.processor()
