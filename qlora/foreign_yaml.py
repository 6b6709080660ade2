"""YAML that a stranger wrote, bounded before it is built: another trainer's configuration.

Ten lines of aliases can stand for a billion values, a tag can name a Python object, nesting ends the interpreter's
stack, and a key that stands twice is two answers. What the parser says is looked at first, event by event; the value is
built by pyyaml's safe loader only when it is known to be small, plain and unambiguous.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from qlora import files, foreign_json

MAX_BYTES = (
    64_000  # the largest example of axolotl, LLaMA-Factory and Unsloth has 5,000; the parser does 50,000 a second
)
MAX_DEPTH = 16  # theirs have 4
MAX_VALUES = 5_000  # with each alias counted as what it stands for
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))
_SHOWN = 120


def load_table(file: Path, named: str) -> dict[str, Any]:
    """The mapping in a file of YAML or JSON; `named` is how errors name it.

    Raises ForeignFileError for whatever is no regular file of UTF-8, no mapping with names for keys, or beyond a bound.
    """
    try:
        data = files.read_bytes(Path(os.path.realpath(file)), MAX_BYTES)
    except files.UnsafePathError as error:
        reason = "is no regular file" if not file.is_file() else f"has more than {MAX_BYTES:,} bytes"
        raise foreign_json.ForeignFileError(f"{named}: {reason}") from error
    except OSError as error:
        raise foreign_json.ForeignFileError(f"{named}: cannot be read ({error.strerror or error})") from error
    if data.lstrip()[:1] == b"{":
        return _table(foreign_json.parse(data, named), named)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise foreign_json.ForeignFileError(f"{named}: is not UTF-8 text (byte {error.start:,})") from error
    return parse_table(text, named)


def parse_table(text: str, named: str) -> dict[str, Any]:
    """The mapping in a text. Raises as `load_table` does."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise foreign_json.ForeignFileError(f"{named}: has more than {MAX_BYTES:,} bytes")
    return _table(_parse(text, named), named)


def _parse(text: str, named: str) -> Any:
    try:
        _check_events(text, named)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            if _size(node, {}, ()) > MAX_VALUES:
                raise foreign_json.ForeignFileError(f"{named}: its aliases stand for more than {MAX_VALUES:,} values")
            _check_keys(node, named, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or "it cannot be read").split())[:_SHOWN]
        raise foreign_json.ForeignFileError(f"{named}{line}: is not valid YAML ({problem})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, a date that is none
        if isinstance(error, foreign_json.ForeignFileError):
            raise
        reason = " ".join(str(error).split())[:_SHOWN]
        raise foreign_json.ForeignFileError(f"{named}: is not valid YAML ({reason})") from error


def _check_events(text: str, named: str) -> None:
    """Depth, count and tags, without building anything."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        where = f"{named}, line {event.start_mark.line + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise foreign_json.ForeignFileError(f"{where}: is nested deeper than {MAX_DEPTH} levels")
        if count > 2 * MAX_VALUES:
            raise foreign_json.ForeignFileError(f"{where}: holds more than {MAX_VALUES:,} values")
        if documents > 1:
            raise foreign_json.ForeignFileError(f"{where}: a second document begins; keep the one that is meant")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_PLAIN):
            raise foreign_json.ForeignFileError(
                f"{where}: a value has the tag {str(tag)[:60]!r}; plain values have none"
            )


def _size(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node stands for, its aliases written out."""
    if id(node) in above:
        raise ValueError("an alias stands for what it is a part of")
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_size(part, known, (*above, id(node))) for part in parts)
    return known[id(node)]


def _check_keys(node: Any, named: str, looked_at: set[int]) -> None:
    """Each key once: YAML's own rule, which its loader does not hold. What aliases share is looked at once."""
    if id(node) in looked_at:
        return
    looked_at.add(id(node))
    seen: set[str] = set()
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, _ in pairs:
        where = f"{named}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise foreign_json.ForeignFileError(f"{where}: a key is no plain name")
        if key.value in seen:
            raise foreign_json.ForeignFileError(f"{where}: the key {key.value[:60]!r} stands twice")
        seen.add(key.value)
    values = [value for _, value in pairs] or (node.value if isinstance(node, yaml.SequenceNode) else [])
    for value in values:
        _check_keys(value, named, looked_at)


def _table(value: Any, named: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise foreign_json.ForeignFileError(f"{named}: holds no mapping of keys to values")
    return {str(key): item for key, item in value.items()}
