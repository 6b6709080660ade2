"""JSON that a stranger wrote: bounded while it is read, then checked by a pydantic model, as a recipe is.

Base configurations, adapters, run folders and caches all come from somebody. What is wrong is raised here, where the
value is read, as a ForeignFileError that names file, key and value; the caller adds the class of error and what to do.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from qlora import files

MAX_BYTES = 10_000_000  # the largest config.json known to us has 0.3 MB
MAX_DEPTH = 64  # 12 is the deepest configuration of a model known to us
# Of a whole number: 2**63 - 1 has 19, and transformers writes a tokenizer without a limit of length as int(1e30).
MAX_DIGITS = 40
# What begins or parts values in a text. An empty list is three bytes of it and 64 of memory.
MAX_VALUES = 4_000_000
_SHOWN = 60  # characters of a value in a message

Model = TypeVar("Model", bound="ForeignModel")
Data = TypeVar("Data")


class ForeignFileError(ValueError):
    """What is wrong with a stranger's file: the file, the key or place in it, and the value."""


class ForeignModel(BaseModel):
    """The keys of a stranger's file that we read, with their types; other keys are let pass."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


def load(file: Path, max_bytes: int = MAX_BYTES, shown: Path | None = None) -> Any:
    """The JSON value in a file. `file` is resolved already, `shown` is how errors name it.

    Raises ForeignFileError for what is no JSON, a key that stands twice, numbers longer than MAX_DIGITS or too large to
    be finite, nesting deeper than MAX_DEPTH, more than MAX_VALUES values, a file over `max_bytes`, and whatever cannot
    be opened. `Infinity` and `NaN`, which Python writes, are read.
    """
    named = shown or file
    try:
        data = files.read_bytes(file, max_bytes)
    except files.UnsafePathError as error:
        raise ForeignFileError(str(error).replace(str(file), str(named))) from error
    except OSError as error:
        raise ForeignFileError(f"{named}: cannot be read ({error.strerror or error})") from error
    return parse(data, str(named))


def parse(data: bytes | str, where: str) -> Any:
    """The JSON value of a text; `where` names it in errors. Raises as `load` does."""
    text = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    if sum(map(text.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise ForeignFileError(f"{where}: holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_int=_whole_number, parse_float=_number)
    except RecursionError as error:
        raise ForeignFileError(f"{where}: is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise ForeignFileError(f"{where}: is not valid JSON ({error})") from error
    if depth_of(value, MAX_DEPTH) > MAX_DEPTH:
        raise ForeignFileError(f"{where}: is nested deeper than {MAX_DEPTH} levels")
    return value


def load_object(file: Path, max_bytes: int = MAX_BYTES, shown: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file. Raises as `load` does, and for any other value."""
    return _object(load(file, max_bytes, shown), shown or file)


def parse_object(data: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object of a text. Raises as `load_object` does."""
    return _object(parse(data, where), where)


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ForeignFileError(f"{where}: holds no JSON object")
    return value


def checked(model: type[Model], value: Any, where: str) -> Model:
    """The value as `model`. Raises ForeignFileError with the first key that is wrong, and its value."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _wrong(error, where) from error


def _wrong(error: ValidationError, where: str) -> ForeignFileError:
    first = error.errors(include_url=False)[0]
    key = ".".join(repr(str(part)[:_SHOWN])[1:-1] for part in first["loc"]) or "the value"
    return ForeignFileError(f"{where}: {key} is wrong: {reason(first, 'a JSON object')}{shown(first)}")


def reason(item: Any, table: str) -> str:
    """What an error of pydantic says, without Python's types and our classes; a `table` as that kind of file has it."""
    wanted = {"tuple_type": "a list", "list_type": "a list", "set_type": "a list"}
    wanted |= dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), table)
    if (kind := wanted.get(item["type"])) is not None:
        return f"Input should be {kind}"
    return str(item["msg"]).removeprefix("Value error, ")


def checked_dataclass(kind: type[Data], value: Any, where: str) -> Data:
    """The value as an instance of a dataclass, its types and bounds checked as `checked` does."""
    return kind(**dict(checked(_model_of(kind), value, where)))  # type: ignore[arg-type]


def checked_line(kind: type[Data], line: bytes, where: str) -> Data:
    """The JSON object of a line as an instance of a dataclass of plain values, tuples and dataclasses of them.

    Bounded as `parse` bounds it, types and bounds checked as `checked` does.
    """
    parse_object(line, where)
    try:
        read: Data = _adapter_of(kind).validate_json(line, strict=True)  # type: ignore[arg-type]
        return read
    except ValidationError as error:
        raise _wrong(error, where) from error


@cache
def _adapter_of(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _model_of(kind: type[Any]) -> type[ForeignModel]:
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {
        name: (hints[name], ... if value is dataclasses.MISSING else value) for name, value in defaults.items()
    }
    return create_model(kind.__name__, __base__=ForeignModel, **given)


def depth_of(value: Any, limit: int) -> int:
    """How deeply lists and objects are nested in a JSON value, counted up to `limit` + 1."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > limit:
            break
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def shown(problem: Any) -> str:
    """The wrong value of a pydantic problem, cut to fit into a line; "" where it is missing or long by nature."""
    given = problem.get("input")
    if problem["type"] == "missing" or isinstance(given, dict | list):
        return ""
    text = repr(given)
    return f" (it is {text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''})"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:_SHOWN]!r} stands twice")
    return keys


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text.lstrip('-')):,} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > 400 or (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"a number that is too large ({text[:20]}…)")
    return value
