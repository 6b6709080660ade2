"""Cards by name and size, sizes as people write them, and this machine."""

from __future__ import annotations

import pytest

from qlora.errors import HardwareError, RecipeError
from qlora.memory import hardware
from qlora.recipe.reading import recipe_of_base
from qlora.recipe.sections import parse_bytes
from qlora.units import GIB


@pytest.mark.parametrize("gigabytes", hardware.SOLD_GIGABYTES)
def test_a_size_that_cards_are_sold_in_means_what_the_driver_leaves(gigabytes: int) -> None:
    machines = [
        hardware.asked_for(None, text, "auto")
        for text in (f"{gigabytes}GB", f"{gigabytes} GiB", f"{gigabytes}", f"{gigabytes}g", f" {gigabytes}.0 gb ")
    ]
    assert len({machine.limit_bytes for machine in machines}) == 1
    assert 0.93 * gigabytes * GIB < machines[0].limit_bytes < gigabytes * GIB
    assert f"sold with {gigabytes} GB, less what its driver keeps" in machines[0].source


def test_an_8_gb_card_has_what_such_cards_have() -> None:
    assert 7.6 * GIB - 1 <= hardware.asked_for(None, "8GB", "auto").limit_bytes < 7.8 * GIB


@pytest.mark.parametrize(
    ("text", "count"), [("7.5GiB", int(7.5 * GIB)), ("40GB", 40 * 10**9), ("8192MiB", 8 * GIB), ("13 gib", 13 * GIB)]
)
def test_any_other_size_and_the_limit_of_a_recipe_mean_just_that(text: str, count: int) -> None:
    machine = hardware.asked_for(None, text, "auto")
    assert (machine.limit_bytes, machine.source) == (count, "as given")
    assert hardware.asked_for(None, None, text).limit_bytes == count
    assert hardware.asked_for(None, None, "8GiB").limit_bytes == 8 * GIB


def test_cards_that_stand_for_a_size_are_in_the_table() -> None:
    assert [hardware.find(name).gigabytes for name in hardware.CARD_OF_GIGABYTES.values()] == [4, 6, 8, 12, 16, 24]
    assert list(hardware.common_cards()) == ["4 GB", "6 GB", "8 GB", "12 GB", "16 GB", "24 GB"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 * GIB),
        ("7.5 gib", int(7.5 * GIB)),
        ("8GB", 8 * 10**9),
        ("900MiB", 900 << 20),
        ("12", None),
        ("6 G", None),
    ],
)
def test_sizes(text: str, count: int | None) -> None:
    assert parse_bytes(text) == count


def test_a_limit_that_is_no_size_is_refused_with_its_key() -> None:
    with pytest.raises(RecipeError, match=r"memory\.limit"):
        recipe_of_base("owner/name", ["memory.limit=6"])


def test_this_machine_has_ram_and_takes_the_limit_of_the_recipe() -> None:
    machine = hardware.this_machine()
    assert machine.limit_bytes > 0
    assert hardware.this_machine("3GiB").limit_bytes == 3 * GIB


def test_a_size_and_a_name_exclude_each_other_and_sizes_have_a_card() -> None:
    assert hardware.asked_for(None, "8GiB", "auto").gpu == hardware.find("RTX 3070")
    with pytest.raises(HardwareError, match="not a size"):
        hardware.asked_for(None, "much", "auto")
