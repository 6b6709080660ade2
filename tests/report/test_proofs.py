"""The table of proofs: a line a promise, and what it was tried on."""

from __future__ import annotations

from rich.console import Console

from qlora.report.proofs import proofs_view


def test_each_promise_has_its_line() -> None:
    proofs = [
        {"name": "resume", "outcome": "held", "said": "the same bits", "seconds": 12.34},
        {"name": "speed", "outcome": "broken", "said": "[bold]too fast", "seconds": 0.5},
    ]
    found = {
        "proofs": proofs,
        "hardware": {"device": "RTX 4090"},
        "model": {"shape": "8b", "rows": 4, "length": 2048},
        "outcomes": {"held": 1, "broken": 1, "not here": 0},
        "seconds": 123.4,
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(proofs_view(found))
    text = console.export_text()
    assert "resume" in text and "held" in text and "12.3" in text and "[bold]too fast" in text
    assert "RTX 4090, a random 8b model in NF4, 4 x 2,048 tokens: 1 held, 1 broken, in 123 seconds" in text
