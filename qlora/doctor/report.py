"""The findings as one JSON value that may be attached to a public report: no path, no name, no program of here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora import anonymous, shown
from qlora.doctor.caches import Kept
from qlora.doctor.finding import Colour, Finding, worst
from qlora.redaction import redact_all
from qlora.version import __version__

FORMAT = 1


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Ready for `json.dumps`. What is for this machine's user alone (`Finding.here`) is left out."""
    checks = [
        {
            "name": one.name,
            "colour": str(one.colour),
            "said": one.said,
            "mend": one.mend,
            "figures": dict(one.figures),
        }
        for one in findings
    ]
    count = {str(colour): sum(one.colour == colour for one in findings) for colour in Colour}
    whole = {"format": FORMAT, "qlora": __version__, "worst": str(worst(findings)), "count": count, "checks": checks}
    return anonymous.values(shown.plain_values(redact_all(whole)))  # type: ignore[no-any-return]


def caches_as_dict(entries: Sequence[Kept], cleared: Sequence[str]) -> dict[str, Any]:
    """What lies in caches, for a program of this user's: with its folders. `cleared` are paths that are gone."""
    gone = set(cleared)
    kept = [
        {
            "kind": one.kind,
            "path": str(one.path),
            "bytes": one.bytes,
            "said": one.said,
            "stays": one.stays,
            "cleared": str(one.path) in gone,
        }
        for one in entries
    ]
    return {"format": FORMAT, "entries": kept, "bytes": sum(one.bytes for one in entries)}
