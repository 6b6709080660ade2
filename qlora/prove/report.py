"""What proofs found, as one JSON value: hardware and versions, no path and no name of a person or machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora import anonymous, run_folder, shown
from qlora import device as hardware
from qlora.prove.proof import Place
from qlora.prove.suite import Result
from qlora.redaction import redact_all

FORMAT = 1
HELD, BROKEN, NOT_HERE = "held", "broken", "not here"
_PROCESSOR = re.compile(r"^model name\s*:\s*(.{1,100})$", re.MULTILINE)


def outcome_of(result: Result) -> str:
    return NOT_HERE if result.outcome.holds is None else HELD if result.outcome.holds else BROKEN


def as_dict(place: Place, results: Sequence[Result]) -> dict[str, Any]:
    """Ready for `json.dumps`. What errors quote is made anonymous first."""
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
    return anonymous.values(shown.plain_values(redact_all(whole)))  # type: ignore[no-any-return]


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


def _processor() -> str:
    try:
        found = _PROCESSOR.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    return found[1] if found else platform.processor()
