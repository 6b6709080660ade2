"""A recipe file that we write for somebody: commented, its schema beside it, and never over what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora import files, foreign_toml, run_record, shown
from qlora.errors import UserError
from qlora.importers.draft import toml
from qlora.recipe.reading import recipe_of_table, recipe_schema

SCHEMA = "recipe.schema.json"
LINES_AT_MOST = 200  # of comments: a file of a stranger may have any number of keys
_TABLES = (("data", "train"), ("data", "eval"))


def target_of(name: str | Path) -> Path:
    """Where a new recipe is to stand. Raises UserError where something stands there, or nothing can."""
    path = files.user_path(name, "the new recipe")
    if os.path.lexists(Path(name).expanduser()) or os.path.lexists(path):  # a link that leads nowhere is there too
        raise UserError(f"{path}: is there already, and nothing is overwritten", "give the new recipe another name")
    if path.suffix != ".toml":
        raise UserError(f"{path}: a recipe's name ends in .toml", f"for example {path.stem or 'first'}.toml")
    if why := run_record.not_a_name(path.stem):
        raise UserError(f"{path}: a run is called like its recipe, and cannot be ({why})", "give it another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder", "make it, or name a place in one that is there")
    return path


def write(path: Path, table: Mapping[str, Any], head: Sequence[str], notes: Mapping[str, str]) -> None:
    """Write a recipe that reads back to `table`: comments first, `notes` by `table.key` behind their lines.

    The schema is put beside it, unless something of that name is there. Raises RecipeError for a table that is no
    recipe, before anything is written.
    """
    text = text_of(_relative(table, path.parent), head, notes)
    recipe_of_table(foreign_toml.parse(text), path, text)
    schema = path.parent / SCHEMA
    with files.open_to_write(path, "new") as file:
        files.write_all(file, text.encode())
    if not os.path.lexists(schema):
        with files.open_to_write(schema, "new") as file:
            files.write_all(file, (json.dumps(recipe_schema(), indent=2) + "\n").encode())


def text_of(table: Mapping[str, Any], head: Sequence[str], notes: Mapping[str, str]) -> str:
    """The recipe's TOML: a table a section, sources last of their section."""
    lines = [f"#:schema ./{SCHEMA}"]
    lines += [f"# {shown.one_line(line)}".rstrip() for line in head[:LINES_AT_MOST]]
    if more := len(head) - LINES_AT_MOST:
        lines += [f"# … and {more:,} more lines"] if more > 0 else []
    for section, keys in table.items():
        plain = {key: value for key, value in keys.items() if (section, key) not in _TABLES}
        if plain:
            lines += ["", f"[{section}]"]
            lines += [_line(f"{section}.{key}", key, value, notes) for key, value in plain.items()]
        for key in (key for key in keys if (section, key) in _TABLES):
            for entry in keys[key]:
                lines += ["", f"[[{section}.{key}]]"]
                lines += [_line(f"{section}.{key}.{name}", name, value, notes) for name, value in entry.items()]
    return "\n".join(lines) + "\n"


def _line(place: str, key: str, value: Any, notes: Mapping[str, str]) -> str:
    line = f"{key} = {toml(value)}"
    note = notes.get(place)
    return line if not note else f"{line:<34} # {shown.one_line(note)}"


def _relative(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Paths below the recipe's folder as it would be moved with them."""

    def shorter(path: str) -> str:
        below = os.path.isabs(path) and Path(path).is_relative_to(folder)
        return Path(path).relative_to(folder).as_posix() if below else path

    data = dict(table.get("data", {}))
    for _, key in _TABLES:
        if key in data:
            data[key] = [{**entry, "path": shorter(entry["path"])} for entry in data[key]]
    model = {**table["model"], "base": shorter(table["model"]["base"])}
    if model["base"] != table["model"]["base"]:
        model["base"] = f"./{model['base']}"  # a name alone would be the hub's
    return {**table, "model": model, **({"data": data} if data else {})}
