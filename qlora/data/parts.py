"""The content of a turn that is a list of parts: OpenAI's, Anthropic's blocks, Gemini's `parts`.

A part is text, a thought, a call or a tool's result; anything else, such as an image, raises RowError by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qlora.data.calls import result_text, tool_calls
from qlora.data.marks import ONLY_TEXT
from qlora.data.row_json import RowError, kind_of, text_of
from qlora.data.unread import Fields, Ledger

TEXT, THOUGHT, CALL, RESULT = "text", "thought", "call", "result"
_TEXT_TYPES = ("text", "input_text", "output_text")
_THOUGHT_TYPES = {"thinking": "thinking", "reasoning": "text", "thought": "text"}
_CALL_KEYS, _RESULT_KEYS = ("functionCall", "function_call"), ("functionResponse", "function_response")
_HINT = "train rows of text from a file of their own"


class Part(NamedTuple):
    """`value`: a text, a tool call, or the message of a tool's result."""

    kind: str
    value: Any


def parts_of(value: list[Any], place: str, ledger: Ledger) -> Iterator[Part]:
    """The parts in their order. Raises RowError for one that is neither text, thought, call nor result."""
    for number, item in enumerate(value):
        where = f"{place}[{number}]"
        if not isinstance(item, Mapping):
            raise RowError(f"{where} is a part of type {kind_of(item)!r}: {ONLY_TEXT}", _HINT)
        part = ledger.open(item, where)
        kind = part.take("type")
        if kind in _TEXT_TYPES or (kind is None and isinstance(part.peek("text"), str)):
            text = text_of(part.take("text"), f"{where}.text")
            yield Part(THOUGHT if part.take("thought") is True else TEXT, text)
        elif isinstance(kind, str) and kind in _THOUGHT_TYPES:
            part.take("signature")  # the publisher's seal on the thought, of no meaning to another model
            yield Part(THOUGHT, text_of(part.get(_THOUGHT_TYPES[kind], "text", "content"), f"{where}.{kind}"))
        elif kind == "tool_use":
            part.take("name"), part.take("input"), part.take("id")
            call = {key: item[key] for key in ("id", "name", "input") if key in item}
            yield Part(CALL, tool_calls([call], where, ledger)[0])
        elif kind == "tool_result":
            yield Part(RESULT, _result(part, part.take("content"), part.take("tool_use_id"), where))
        elif kind is None and (called := part.get(*_CALL_KEYS)) is not None:
            yield Part(CALL, tool_calls([called], where, ledger)[0])
        elif kind is None and isinstance(answered := part.get(*_RESULT_KEYS), Mapping):
            response = ledger.open(answered, where)
            message = _result(response, response.take("response"), response.take("id"), where)
            yield Part(RESULT, {**message, "name": text_of(response.take("name"), f"{where}.name")})
        else:
            names = ", ".join(sorted(map(str, item))[:3])
            raise RowError(f"{where} is a part of type {kind if kind is not None else names!r}: {ONLY_TEXT}", _HINT)


def _result(fields: Fields, content: Any, identity: Any, where: str) -> dict[str, Any]:
    message = {"role": "tool", "content": result_text("" if content is None else content, f"{where}.content")}
    return message if identity is None else {**message, "tool_call_id": text_of(identity, f"{where}.tool_use_id")}
