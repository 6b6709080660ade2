"""How fast bytes reach a card, by its lanes."""

from __future__ import annotations

import pytest

from qlora import processes
from qlora.memory.card_names import find
from qlora.memory.links import between_bytes_per_second, copied_bytes_per_second, lanes
from qlora.processes import Place


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("RTX 4090", 16),
        ("RTX 4090 Laptop", 8),
        ("RTX 4060", 8),
        ("RTX 4060 Ti 16GB", 8),
        ("RTX 4070", 16),
        ("RTX 3060 12GB", 16),
        ("RTX 5060 Ti 16GB", 8),
        ("RX 6500 XT 4GB", 4),
        ("A100 80GB", 16),
    ],
)
def test_lanes_of_a_card(name: str, count: int) -> None:
    assert lanes(find(name)) == count


def test_published_rates_of_copies() -> None:
    """25 GB/s on 16 lanes of generation 4, 12 on 8; an RTX 3050 with 8 was measured at 7.8 to 9.4 (CUDA.md 2.3)."""
    assert copied_bytes_per_second(find("RTX 4090")) == pytest.approx(25e9, rel=0.02)
    assert copied_bytes_per_second(find("RTX 4090 Laptop")) == pytest.approx(12e9, rel=0.06)
    assert 7.8e9 < copied_bytes_per_second(find("RTX 3050 8GB")) < 1.7 * 9.4e9


def test_a_card_that_shares_the_system_s_memory_copies_at_its_speed() -> None:
    assert copied_bytes_per_second(find("GB10")) == 273e9 / 2


def test_cards_of_one_board_share_its_lanes() -> None:
    """Two slots have 8 each; a card that has fewer is the slowest."""
    both = [find("RTX 3090"), find("RTX 3060 12GB")]
    assert between_bytes_per_second(both) == copied_bytes_per_second(find("RTX 4060"))
    assert between_bytes_per_second([*both, find("RX 6500 XT 4GB")]) == copied_bytes_per_second(find("RX 6500 XT 4GB"))
    with processes.taken(Place(0, 2, 0, 2)):
        assert lanes(both[0]) == 8 and lanes(find("RX 6500 XT 4GB")) == 4
