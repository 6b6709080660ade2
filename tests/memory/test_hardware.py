"""Cards by name and size, sizes as people write them, and this machine."""

from __future__ import annotations

import pytest

from qlora.errors import HardwareError, RecipeError
from qlora.memory import hardware
from qlora.memory.hardware import GIB, GPUS
from qlora.recipe.reading import recipe_of_base
from qlora.recipe.sections import parse_bytes


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "geforce-rtx-4090"])
def test_a_card_is_found_by_any_spelling(name: str) -> None:
    assert hardware.find(name).name == "RTX 4090"


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(HardwareError, match="not in the table") as caught:
        hardware.find("RTX 40")
    assert "RTX 4060" in caught.value.hint and "vram=" in caught.value.hint


def test_the_table_is_plausible() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert 0.9 * gpu.gigabytes * GIB < gpu.usable_bytes < gpu.gigabytes * GIB, gpu.name
        assert gpu.capability >= 80, gpu.name  # older ones compute no bf16
    assert set(hardware.CARD_OF_GIGABYTES.values()) <= {gpu.name for gpu in GPUS}


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
