"""How an estimate is drawn: parts with bars, the verdict, plans, and what a picture needs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qlora.report.memory import bar, estimate_view, plans_view, speed_line, verdict

GIB = 1 << 30
ESTIMATE: dict[str, Any] = {
    "peak_bytes": 6 * GIB,
    "error_bytes": GIB // 2,
    "limit_bytes": 8 * GIB,
    "limit_source": "RTX 4060, 8 GB",
    "components": {"weights": 5 * GIB, "context": GIB},
    "phases": {"load": 5 * GIB, "train": 6 * GIB},
    "settings": {"lora.r": 8},
    "host_peak_bytes": 2 * GIB,
    "disk_bytes": GIB // 2,
    "tokens_per_second": 540.0,
    "tokens_per_second_ideal": 736.0,
    "speed": None,
    "notes": ["it depends"],
}


def drawn(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "full", "text"),
    [(0, 8, ""), (8, 8, "████"), (16, 8, "████"), (4, 8, "██"), (1, 8, "▌"), (3, 0, "")],
)
def test_a_bar_is_exact_to_an_eighth(value: float, full: float, text: str) -> None:
    assert bar(value, full, 4) == text


def test_each_part_the_limit_and_where_it_comes_from() -> None:
    text = drawn(estimate_view(ESTIMATE))
    for words in ("weights", "5.00 GiB", "the frozen base", "RTX 4060, 8 GB", "it fits: 1.50 GiB are left"):
        assert words in text
    assert text.startswith("limit 8.00 GiB: RTX 4060, 8 GB")
    assert (
        "540 tokens/s predicted on such a card; arithmetic alone would allow 736" in text
        and "it depends" in text
        and "lora.r = 8" in text
    )


def test_where_predicted_time_goes_is_said_where_it_is_not_computed() -> None:
    waiting = {"seconds": {"layers_forward": 3.0, "of_it_waiting_for_copies": 1.0}, "host_bound": True}
    line = speed_line({**ESTIMATE, "speed": waiting})
    assert "33% of the time waits for copies" in line and line.endswith(
        "starting its kernels takes longer than running them"
    )
    assert speed_line({**ESTIMATE, "tokens_per_second": 0.0}) == ""


def test_what_is_missing_is_counted() -> None:
    assert verdict(9 * GIB, 8 * GIB).plain == "it does not fit: 1.00 GiB are missing"


def test_plans_stand_with_their_lines() -> None:
    plans = [{"estimate": ESTIMATE, "lines": ["data.max_length = 1024"]}, {"estimate": ESTIMATE, "lines": []}]
    text = drawn(plans_view(plans))
    assert "data.max_length = 1024" in text and "none: it fits as it is" in text
