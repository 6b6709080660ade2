"""The nine doors by name, and a process that is warm: everything imported, every good thing made."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.attacks.fuzz import (
    adapter_door,
    base_door,
    cache_door,
    documents_door,
    goods,
    here_door,
    recipe_door,
    rows_door,
    run_door,
    terminal_door,
)
from tests.attacks.fuzz.golden import NAMED
from tests.attacks.fuzz.harness import Door, Fuzzer

_ALL = (
    *(base_door, adapter_door, run_door, rows_door, documents_door),
    *(recipe_door, cache_door, here_door, terminal_door),
)
DOORS: dict[str, Door] = {module.DOOR.name: module.DOOR for module in _ALL}
# What the first input would otherwise import.
WARM = (
    *("qlora.export.pipeline", "qlora.training.loop", "qlora.cli.train", "qlora.cli.export", "qlora.cli.estimate"),
    *("qlora.memory.estimate", "pyarrow.parquet", "qlora.report.console", "datasets", "qlora.data.hub_rows"),
    *("qlora.study.lesson", "tests.data.documents.cases"),
)


def fuzzer_in(folder: Path, seed: int) -> Fuzzer:
    """All doors, with good things made in `folder`."""
    for name in WARM:
        importlib.import_module(name)
    made = goods.make(folder / "goods", seed)
    return Fuzzer(DOORS, made, folder / "scratch", made.home / "documents", seed, NAMED)
