"""Hours and memory to come, in words."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.report.ahead import hours_line, lines, memory_line

HOURS: dict[str, Any] = {
    "study": (79.0, 328.0),
    "exam": (50.0, 94.0),
    "training": (71.0, 351.0),
    "where": "on RTX 4060",
    "limited": False,
}
MEMORY: dict[str, Any] = {
    "peak_bytes": 737 << 20,
    "error_bytes": 12 << 20,
    "limit_bytes": 8 << 30,
    "fits": True,
    "phases": {"load": 1, "train": 641 << 20, "study": 674 << 20, "exam": 737 << 20},
    "limit_source": "RAM available",
}


def test_a_range_and_its_parts() -> None:
    assert hours_line(HOURS) == (
        "time to come: about 7 min on RTX 4060 (3 min to 13 min): study 1 min to 5 min, exam 50 s to 2 min, "
        "training 1 min to 6 min"
    )
    assert hours_line({**HOURS, "limited": True}).endswith(", where study.max_minutes ends it")
    assert "exam" not in hours_line({**HOURS, "exam": (0.0, 0.0)})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (9, "9 s"),
        (44, "40 s"),
        (59, "1 min"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (4e4, "11 h"),
        (4e5, "5 days"),
    ],
)
def test_no_length_is_said_closer_than_it_is_known(seconds: float, said: str) -> None:
    always = {**HOURS, "study": (seconds, seconds), "exam": (0.0, 0.0), "training": (0.0, 0.0)}
    assert f"study {said}" in hours_line(always)


def test_memory_by_phase() -> None:
    said = memory_line(MEMORY)
    assert said == (
        "memory to come: 737 MiB at its peak of 8.00 GiB (RAM available): study 674 MiB, exam 737 MiB, train 641 MiB"
    )
    assert "does not fit" in memory_line({**MEMORY, "fits": False})


def test_what_is_not_known_is_not_said() -> None:
    assert lines(None) == [] == lines({"hours": None, "memory": None})
    assert len(lines({"hours": HOURS, "memory": None})) == 1 and len(lines({"hours": HOURS, "memory": MEMORY})) == 2
