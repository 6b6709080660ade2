"""One MiB and one GiB for the whole house, and one word for one thing."""

from __future__ import annotations

from qlora.recipe.sections import parse_bytes
from qlora.units import GIB, MIB, counted, gib, layers_of


def test_sizes_are_those_that_recipes_and_messages_mean() -> None:
    assert parse_bytes("1GiB") == GIB and parse_bytes("1MiB") == MIB
    assert gib(1.5 * GIB) == "1.50 GiB" and gib(0) == "0.00 GiB"


def test_of_little_the_size_is_said_too() -> None:
    assert [gib(size) for size in (GIB / 100, 1.5 * MIB, 1536)] == ["0.01 GiB", "1.5 MiB", "1.5 KiB"]


def test_one_and_many() -> None:
    assert [counted(count, "page") for count in (0, 1, 2, 2000)] == ["0 pages", "1 page", "2 pages", "2,000 pages"]


def test_which_layers_are_recomputed() -> None:
    """A setting of 1 is a number of layers, and no True."""
    assert [layers_of(setting) for setting in (False, True)] == ["no layer", "layers"]
    assert [layers_of(setting) for setting in (1, 2, 1000)] == [
        "the first layer",
        "the first 2 layers",
        "the first 1,000 layers",
    ]
