"""The command that fuzzes counts every file of attacks, and its tables say what there was."""

from __future__ import annotations

from tests.attacks.fuzz.doors import DOORS
from tests.attacks.fuzz.golden import NAMED
from tests.attacks.fuzz.harness import Outcome
from tools import fuzz


def test_every_file_of_attacks_has_a_door() -> None:
    files = {path.stem for path in (fuzz.ROOT / "tests" / "attacks").glob("test_*.py")} - {*fuzz.NOT_ATTACKS}
    assert files <= set(fuzz.FILES), "name its door in FILES of tools/fuzz.py"
    assert set(fuzz.FILES.values()) <= set(DOORS) == set(NAMED)


def test_the_table_counts_by_door() -> None:
    outcomes = [
        Outcome("rows", 0, seconds=0.25),
        Outcome("rows", 1, code=2, growth_bytes=3 << 20),
        Outcome("rows", 2, code=1, fault="KeyError: 'x'"),
        Outcome("rows", 3, code=0, fault="a marker was left"),
    ]
    line = fuzz.table({"rows": outcomes}).splitlines()[-1]
    assert line == "| rows | 4 | 1 | 1 | 2 | 250 ms | 3 MiB |"


def test_the_payloads_are_added_up() -> None:
    assert fuzz.payload_table({"base": 1200, "rows": 34}).splitlines()[-1] == "| all | 1,234 |"
