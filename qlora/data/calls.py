"""Tools, calls of them and what they gave back, as OpenAI, ShareGPT, Anthropic and Gemini write them.

All become what chat templates read: a call with its arguments as an object, a tool with `parameters` in a wrapper of
type `function`. JSON text is parsed wherever an object may stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora.data.row_json import RowError, is_blank, json_text, kind_of, list_of, object_of, parsed, text_of
from qlora.data.unread import Ledger

Message = dict[str, Any]
Tools = tuple[dict[str, Any], ...]
# How Hermes and Qwen mark a call within an assistant's text.
_TAGGED_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def calls_of_text(value: Any, place: str, ledger: Ledger) -> list[dict[str, Any]]:
    """The calls of a turn that is nothing else: JSON of one or several, or each between `<tool_call>` marks."""
    if isinstance(value, str) and "<tool_call>" in value:
        if _TAGGED_CALL.sub("", value):
            raise RowError(f"{place} has other text beside its <tool_call>")
        value = [parsed(text, place) for text in _TAGGED_CALL.findall(value)]
    value = parsed(value, place)
    return tool_calls(value if isinstance(value, list) else [value], place, ledger)


def tool_calls(calls: list[Any], place: str, ledger: Ledger) -> list[dict[str, Any]]:
    """Calls with `id` where they have one, and `function` of a name and arguments. Raises RowError."""
    return [_call(call, f"{place}[{number}]", ledger) for number, call in enumerate(calls)]


def _call(value: Any, where: str, ledger: Ledger) -> dict[str, Any]:
    call = object_of(value)
    wrapped = object_of(call["function"]) if call is not None and "function" in call else call
    if call is None or wrapped is None or not isinstance(wrapped.get("name"), str) or not wrapped["name"]:
        raise RowError(f"{where} is not a tool call: an object with name and arguments")
    outer = ledger.open(call, where)
    function = outer
    if "function" in call:
        outer.take("function")
        function = ledger.open(wrapped, f"{where}.function")
    outer.take("type")
    key = next((key for key in _ARGUMENTS if key in wrapped), _ARGUMENTS[0])
    name, arguments = text_of(function.take("name"), f"{where}.name"), parsed(function.take(key), f"{where}.{key}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}.{key} is {kind_of(arguments)}, not an object")
    json_text(arguments, f"{where}.{key}")
    identity = outer.get("id", "call_id", "tool_call_id")
    found = {"id": text_of(identity, f"{where}.id")} if identity is not None else {}
    return {"type": "function", **found, "function": {"name": name, "arguments": dict(arguments)}}


def result_text(value: Any, place: str) -> str:
    """What a tool gave back: text as it is, parts of text joined, anything else as JSON."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(text_of(part.get("text"), f"{place}[{at}].text") for at, part in enumerate(value))
    if isinstance(value, dict | list | int | float):
        return json_text(value, place)
    return text_of(value, place)


def with_call_ids(messages: list[Message], name: str) -> tuple[Message, ...]:
    """Give calls without an id one, and their results the same, in order.

    Nine letters and digits, because Mistral's templates accept no other; templates that show no ids ignore them.
    """
    if not messages:
        raise RowError(f"{name} is an empty list")
    waiting: list[str] = []
    number = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            call.setdefault("id", f"call{number:05d}")
            waiting.append(call["id"])
            number += 1
        if message["role"] == "tool" and waiting:
            oldest = waiting.pop(0)
            message.setdefault("tool_call_id", oldest)
    return tuple(messages)


def tools_of(value: Any, name: str) -> Tools | None:
    """Tools of a column or a message: a list, one tool alone, or JSON text of these; blank and `null` are none.

    Bare functions get the wrapper that templates expect; Anthropic's `input_schema` and parameters in JSON text become
    `parameters`. Everything else of a tool stays as it stands. Raises RowError.
    """
    value = parsed(value, name)
    if is_blank(value):
        return None
    if isinstance(value, Mapping):
        value = value["tools"] if set(value) == {"tools"} else [value]
    found: list[dict[str, Any]] = []
    for number, item in enumerate(list_of(value, name)):
        where = f"{name}[{number}]"
        tool = object_of(item)
        declared = None if tool is None else tool.get("functionDeclarations", tool.get("function_declarations"))
        if declared is not None:  # Gemini's: one object around a list of them
            found += tools_of(declared, f"{where}.functionDeclarations") or ()
            continue
        function = None if tool is None else object_of(tool["function"]) if "function" in tool else tool
        if tool is None or function is None or not isinstance(function.get("name"), str):
            raise RowError(f"{where} is not a tool: an object with name, description and parameters")
        json_text(tool, where)
        function = _with_parameters(function, where)
        found.append(
            {**tool, "function": function} if "function" in tool else {"type": "function", "function": function}
        )
    return tuple(found) or None


def _with_parameters(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = dict(function)
    if "parameters" not in named and "input_schema" in named:
        named["parameters"] = named.pop("input_schema")
    if isinstance(named.get("parameters"), str):
        named["parameters"] = parsed(named["parameters"], f"{where}.parameters") or {}
    if "parameters" in named and not isinstance(named["parameters"], Mapping | None):
        raise RowError(f"{where}.parameters is {kind_of(named['parameters'])}, not an object")
    return named
