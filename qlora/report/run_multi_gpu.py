"""The cards of a run on its page: each one's share of a step, what it was to need and what it had."""

from __future__ import annotations

from collections.abc import Iterator

from qlora.report.figures import human_bytes
from qlora.report.page import Element, element, table
from qlora.report.run_events import Planned

HEADS = ("process", "card", "of a step", "packs", "needs", "has")


def section(plan: Planned | None) -> Iterator[Element]:
    """Of a run of several processes, as planned; what was measured later is among what happened."""
    if plan is None or not plan.cards:
        return
    yield element("h2", "Cards")
    rows = [
        (
            str(number),
            one.card,
            f"{one.share:.0%}",
            f"{one.packs_of_step:,}",
            human_bytes(one.needed_bytes),
            human_bytes(one.limit_bytes),
        )
        for number, one in enumerate(plan.cards)
    ]
    yield table(HEADS, rows)
