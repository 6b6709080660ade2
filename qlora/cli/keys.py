"""What `qlora-train --keys` prints, which is `recipes/README.md`: recipes, keys, formats and options, as Markdown.

The prose is `keys.md`; the tables are made of the schema of `recipe/sections.py` and of the commands' own options.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined
from typer.models import OptionInfo

from qlora.document_keys import DocumentsSection, QuestionsSection
from qlora.recipe.reading import FREE_SECTIONS, TABLES, Recipe
from qlora.recipe.sections import GGUF_QUANTS, SourceSection
from qlora.recipe_values import Section

PROSE = Path(__file__).with_name("keys.md")
METAVARS = {Path: "PATH", float: "NUMBER", str: "NAME"}


def page(commands: Mapping[str, Callable[..., None]]) -> str:
    """The whole page. `commands` are the functions of the commands by their names."""
    text = PROSE.read_text(encoding="utf-8")
    free = ", ".join(f"`[{name}]`" for name in FREE_SECTIONS)
    options = "\n\n".join(_command(name, function) for name, function in commands.items())
    made = {"keys": "\n\n".join(_sections()), "free": free, "quants": " ".join(GGUF_QUANTS), "commands": options}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: made[match[1]], text).rstrip("\n")


# --- keys ------------------------------------------------------------------------------------------------------------


def _sections() -> Iterator[str]:
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        yield _section(f"`[{name}]`", section)
        if name == "data":
            yield _section("`[[data.train]]`, `[[data.eval]]`", SourceSection)
            yield _section("`[[data.documents]]`", DocumentsSection)
        if name == "exam":
            yield _section("`[[exam.questions]]`", QuestionsSection)


def _section(title: str, section: type[Section]) -> str:
    rows = [
        (f"`{field.alias or key}`", _default(field), _means(field.description or "", field.annotation))
        for key, field in section.model_fields.items()
        if f"{section.__name__.removesuffix('Section').lower()}.{key}" not in TABLES  # those have a table of their own
    ]
    return f"### {title}\n\n{_text(cleandoc(section.__doc__ or ''))}\n\n{_table('key', rows)}"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    return "" if value is None or value == {} else f"`{json.dumps(value)}`"


def _means(description: str, annotation: Any) -> str:
    """The description, and the values that it does not name itself."""
    values = [str(value) for value in _values(annotation)]
    unnamed = any(not re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", description) for value in values)
    listed = f" (one of {', '.join(f'`{value}`' for value in values)})" if len(values) > 1 and unnamed else ""
    return _text(description.rstrip(".")) + listed


def _values(annotation: Any) -> list[Any]:
    """What a literal or an enumeration may be, wherever in the type it stands."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for inner in get_args(annotation) for value in _values(inner)]


# --- commands --------------------------------------------------------------------------------------------------------


def _command(name: str, function: Callable[..., None]) -> str:
    """A command's own words and its options, from the declarations that typer makes its `--help` of."""
    hints = typing.get_type_hints(function, include_extras=True)
    usage, rows = [f"{name} [OPTIONS]"], []
    for parameter in signature(function).parameters.values():
        annotation, info = get_args(hints[parameter.name])
        if isinstance(info, OptionInfo):
            # Within Annotated, the first name stands where typer's older style has the default.
            names = " / ".join(str(info.default).split("/"))
            shown = f"{names} {info.metavar or _metavar(annotation)}".rstrip()
            means = _means(info.help or "", annotation)
            rows.append((f"`{shown}`", _option_default(parameter.default, names, info.show_default), means))
        else:
            usage.append(info.metavar or parameter.name.upper())
            rows.append((f"`{usage[-1]}`", "", _text(info.help)))
    return f"### `{' '.join(usage)}`\n\n{_text(cleandoc(function.__doc__ or ''))}\n\n{_table('option', rows)}"


def _metavar(annotation: Any) -> str:
    return next((METAVARS[kind] for kind in (annotation, *get_args(annotation)) if kind in METAVARS), "")


def _option_default(value: Any, names: str, shown: bool | str) -> str:
    if isinstance(shown, str):
        return f"`{shown}`"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{names.split()[0]}`" if value is True else ""


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(first: str, rows: list[tuple[str, str, str]]) -> str:
    return "\n".join([f"| {first} | default | means |", "| --- | --- | --- |", *(f"| {' | '.join(r)} |" for r in rows)])


def _text(text: str) -> str:
    """Plain text as Markdown: outside of backticks, what looks like a tag is text."""
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if number % 2 else piece.replace("<", "\\<") for number, piece in enumerate(pieces))
