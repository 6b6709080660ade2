"""The picture of README.md: drawn from a run's events, small, and nothing in it is fetched from anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

from qlora.events import End, Evaluated, Event, Sampled, Start, StepDone
from tools import draw_panel

TOOLS = Path(__file__).parent.parent.parent / "tools"
STEPS = [StepDone(n, n / 8, 5 / n, 1e-3, 0.5, 2000, 500, 900.0, 1 << 30, 2.0) for n in range(1, 91)]
EVENTS: list[Event] = [
    Start("quickstart", "/home/somebody/runs/quickstart", "base", None, "cpu", {}, None),
    *STEPS[:50],
    Evaluated(50, 0.25, 1.3, None, 60, True),
    Sampled(50, "Who made the [lamp]?", "Oskar", "Sofia", "Oskar"),
    *STEPS[50:],
    End("finished", 90, 90, 1.0, 1, 1, 0.1, 0.1, None, None, 1, None, None),
]


def text_of(svg: str) -> str:
    return " ".join("".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ").split())


def test_the_middle_of_a_run_is_drawn() -> None:
    recorded = [draw_panel.event_of(json.loads(json.dumps(event.as_dict()))) for event in EVENTS]
    text = text_of(draw_panel.picture(recorded))
    for words in ("62 of 62", "runs/quickstart", "evaluation at step 50: loss 0.2500", "Who made the [lamp]?", "Sofia"):
        assert words in text, text
    assert "somebody" not in text and "finished" not in text


def test_the_shipped_picture_is_small_and_fetches_nothing() -> None:
    svg = (TOOLS / "panel.svg").read_text(encoding="utf-8")
    assert len(svg.encode()) < 60_000
    assert not re.search(r"@font-face|url\((?!#)|href", svg)
    assert re.search(r"\d+ of 378", text_of(svg))
