"""The table of measured families is what its command writes."""

from __future__ import annotations

from pathlib import Path

from qlora.model import packing_table
from tests import all_families
from tools.packing_table import table


def test_the_file_is_what_the_command_writes() -> None:
    assert Path(packing_table.__file__).read_text(encoding="utf-8") == table(packing_table.LEAKS)


def test_it_holds_families_that_are_known_and_safe() -> None:
    assert packing_table.LEAKS.keys() <= all_families.DENSE.keys()
    assert max(packing_table.LEAKS.values()) <= packing_table.LARGEST_LEAK
