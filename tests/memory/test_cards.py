"""The table of cards, against what makers publish."""

from __future__ import annotations

import pytest

from qlora.memory import cards


@pytest.mark.parametrize(
    ("name", "multiprocessors", "gigahertz", "operations"),
    [
        ("RTX 3090", 82, 1.695, 512),
        ("RTX 4090", 128, 2.52, 512),
        ("RTX 5090", 170, 2.407, 512),
        ("RTX A6000", 84, 1.8, 1024),
    ],
)
def test_rates_are_those_of_the_units(name: str, multiprocessors: int, gigahertz: float, operations: int) -> None:
    (row,) = (row for row in (*cards.GEFORCE, *cards.WORKSTATIONS) if row[0] == name)
    assert row[4] == pytest.approx(multiprocessors * gigahertz * operations / 1000, rel=0.01)


def test_a_laptops_card_is_never_faster_than_a_desktops_of_its_name() -> None:
    rows = sorted((*cards.GEFORCE, *cards.WORKSTATIONS), key=lambda row: row[4])
    desktop = {row[0]: row for row in rows if not row[0].endswith("Laptop")}  # the fastest of a name
    pairs = [(row, desktop.get(row[0].removesuffix(" Laptop"))) for row in (*cards.LAPTOPS, *cards.WORKSTATIONS)]
    compared = [(row, other) for row, other in pairs if other is not None and row[0] != other[0]]
    assert len(compared) > 20
    for row, other in compared:
        assert row[4] <= other[4] * 1.1, row[0]  # 3060 Laptop has more units than the desktop's, at a lower clock
