"""What tests of imports share: a configuration written and read, and what became of its keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qlora.importers.draft import Draft
from qlora.importers.read import Imported, read
from qlora.recipe.reading import Recipe


def imported(folder: Path, text: str, name: str = "theirs.yml") -> Imported:
    (folder / name).write_text(text)
    return read(folder / name)


def recipe_of(found: Imported) -> Recipe:
    return Recipe.model_validate(found.table)


def draft(folder: Path = Path("/nowhere")) -> Draft:
    return Draft("theirs", folder)


def left(found: Imported | Draft) -> dict[str, str]:
    """Keys that were not carried, without their values, and why."""
    return {account.key.partition(" = ")[0]: account.said for account in found.accounts if account.fate == "left"}


def told(found: Imported | Draft) -> set[str]:
    """Every key that is accounted for, each by itself."""
    keys: set[str] = set()
    for account in found.accounts:
        keys |= {part.strip() for part in re.split(", | × ", account.key.partition(" = ")[0])}
    return keys


def assert_all_told(found: Imported, keys: dict[str, Any]) -> None:
    """No key of the file is lost in silence, nor one of its tables."""
    known = told(found)
    for key, value in keys.items():
        inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) and key not in known else [key]
        for one in inner:
            assert one in known or any(each.startswith(f"{one}.") for each in known), one
