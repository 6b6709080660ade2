"""Published peaks against what is predicted for their settings: never under with the margin, and not far over."""

from __future__ import annotations

import json
import statistics

import pytest

from tools.bench import peaks
from tools.bench.peaks import Compared, Simulated

CONTENT = json.loads(peaks.FILE.read_text())
ROWS = CONTENT["rows"]
HELD_OUT = [row for row in ROWS if CONTENT["roles"][row["source"]] == "held out"]


def compared(rows: list[dict[str, object]]) -> list[Compared]:
    return [peaks.compare(row, Simulated(**row["simulated"])) for row in rows]  # type: ignore[arg-type]


def test_every_row_says_where_it_is_from_and_each_source_has_one_role() -> None:
    assert {row["source"] for row in ROWS} == set(CONTENT["roles"])
    assert set(CONTENT["roles"].values()) == {"fitting", "held out"}
    for row in ROWS:
        assert row["address"].startswith("https://") and row["model"] in CONTENT["shapes"]
        assert all(count > 0 for count in row["measured"].values())
    assert len(ROWS) >= 80 and len(HELD_OUT) >= 25 and len(CONTENT["roles"]) >= 4


def test_no_published_peak_is_above_the_estimate_and_its_margin() -> None:
    under = [(row["model"], one) for row, one in zip(ROWS, compared(ROWS), strict=True) if one.over < 0]
    assert not under


def test_the_margin_is_not_wide() -> None:
    for rows in (ROWS, HELD_OUT):
        over = [one.over for one in compared(rows)]
        assert statistics.median(over) <= 0.06 and max(over) <= 0.15
    assert statistics.median(abs(one.off) for one in compared(ROWS)) <= 0.02


@pytest.mark.parametrize(("attention", "model"), [("eager", "135M"), ("efficient", "135M"), ("flash", "fsdp_qlora")])
def test_what_is_kept_is_what_is_simulated(attention: str, model: str) -> None:
    """Of the smallest rows: the table in the file is that of this code."""
    row = next(row for row in ROWS if row["settings"]["attention"] == attention and model in row["model"])
    found = peaks.simulate(row, CONTENT["shapes"], {})
    for name, count in row["simulated"].items():
        assert getattr(found, name) == pytest.approx(count, rel=0.005, abs=1 << 20), name
