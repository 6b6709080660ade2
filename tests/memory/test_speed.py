"""How fast a machine is: a card by its figures, a processor by a trial."""

from __future__ import annotations

import pytest

from qlora.memory import hardware
from qlora.memory.speed import Size, Speed, of_machine, of_processor, seconds

QWEN3_4B = Size(layers=36, weights=3_600_000_000, head=389_000_000, kept_bytes=147_456)


def test_a_card_decodes_at_the_speed_of_its_memory() -> None:
    """4.5 bytes of each 4-bit weight in a pass: 340 tokens a second in batches of 28 (RTX 4060, 4 B)."""
    card = of_machine(hardware.asked_for("RTX 4060", None, "auto"))
    passes, rows = 1000, 28
    taken = seconds(card, QWEN3_4B, (passes, passes * rows, passes * rows * 500, passes * rows))
    assert passes * rows / taken == pytest.approx(340, rel=0.2)


def test_what_runs_beside_a_card_s_work_is_not_added() -> None:
    size, work = Size(10, 1000, 0, 0), (10.0, 0.0, 0.0, 0.0)
    both = [Speed(1e12, 100.0, 1e12, 0.001, overlaps) for overlaps in (False, True)]
    assert [seconds(speed, size, work) for speed in both] == [pytest.approx(10 * 10 + 10 * 10 * 0.3), 100.0]


def test_each_part_of_the_work_counts() -> None:
    speed, size = Speed(1e9, 1e9, 1e9, 1e-6, overlaps=False), Size(2, 1000, 500, 16)
    none = (0.0, 0.0, 0.0, 0.0)
    assert seconds(speed, size, none) == 0
    parts = [seconds(speed, size, tuple(1.0 if at == place else 0.0 for at in range(4))) for place in range(4)]  # type: ignore[arg-type]
    assert parts == pytest.approx([1000 / 1e9 + 2 * 300 * 1e-6, 2 * 1000 / 1e9, 16 / 1e9, 2 * 500 / 1e9])


def test_this_processor_is_tried() -> None:
    speed = of_processor()
    assert not speed.overlaps and 1e7 < speed.arithmetic < 1e16 and 1e5 < speed.weights < 1e13
    assert 1e6 < speed.kept_bytes < 1e13 and 1e-8 < speed.operation_seconds < 0.1
