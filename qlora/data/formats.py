"""Rows of the known formats to conversations.

A conversation is a tuple of messages in the form that chat templates read: `role`, `content` (always text), and
where there are any `tool_calls` (arguments as an object, never as a JSON string), `tool_call_id`, `name`,
`reasoning_content`. One key of ours is added: `train = False` on an assistant message whose tokens are context
only. What a row says is kept to the letter; what cannot be understood raises RowError, never a guess.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.data.row_json import RowError, json_text, kind_of, load_json

Row = Mapping[str, Any]
Message = dict[str, Any]

# Columns that tell each format, in the order in which they are looked for.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names of the same roles; a call is an assistant's message, made of JSON.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """One row to learn from: messages (with the tools they may call), or one plain text trained whole."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None


def detect_format(columns: Collection[str]) -> str:
    """The format whose columns are all there. Raises RowError with what was found and what is known."""
    if {"chosen", "rejected"} <= set(columns):
        raise RowError("these are preference rows (columns chosen and rejected), which are not trained on")
    for name, needed in FORMAT_COLUMNS.items():
        if set(needed) <= set(columns):
            return name
    known = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in FORMAT_COLUMNS.items())
    found = _names(columns)
    raise RowError(f"no known format has these columns: {found} (known are {known}; data.train.columns renames)")


def to_conversation(row: Row, format: str) -> Conversation:
    """Read one row as the given format. Raises RowError."""
    missing = [column for column in FORMAT_COLUMNS[format] if row.get(column) is None]
    if missing:
        has = _names([key for key in row if row[key] is not None])
        raise RowError(f"{format} needs the column {' and '.join(missing)}; this row has: {has}")
    return _READERS[format](row)


def _names(columns: Collection[str]) -> str:
    """Names of columns in their order, the first few of many."""
    first = [name[:40] for name in heapq.nsmallest(10, columns)]
    return ", ".join(first) + (f" and {len(columns) - 10:,} more" if len(columns) > 10 else "") or "none"


def _read_messages(row: Row) -> Conversation:
    return Conversation(_messages(row["messages"], "messages"), _tools(row.get("tools")))


def _read_prompt_completion(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        before: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    else:
        # A prompt's assistant turns are context, whatever their own `train` says.
        before = tuple(
            {**message, "train": False} if message["role"] == "assistant" else message
            for message in _messages(prompt, "prompt")
        )
    if isinstance(completion, str):
        after: tuple[Message, ...] = (_answer(completion, "completion"),)
    else:
        after = _messages(completion, "completion")
    return Conversation(before + after, _tools(row.get("tools")))


def _read_alpaca(row: Row) -> Conversation:
    messages = _system_column(row)
    for number, pair in enumerate(_list(row.get("history") or [], "history")):
        place = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place} is not a pair of question and answer")
        messages.append({"role": "user", "content": _text(pair[0], f"{place}[0]")})
        messages.append(_answer(pair[1], f"{place}[1]"))
    instruction = _text(row["instruction"], "instruction")
    given = _text(row.get("input") or "", "input")
    messages.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
    messages.append(_answer(row["output"], "output"))
    return Conversation(tuple(messages))


def _read_sharegpt(row: Row) -> Conversation:
    messages = _system_column(row)
    for number, item in enumerate(_list(row["conversations"], "conversations")):
        place = f"conversations[{number}]"
        if not isinstance(item, Mapping):
            raise RowError(f"{place} is {kind_of(item)}, not an object with from and value")
        if "from" not in item or "value" not in item:
            other = " (it looks like the messages format)" if "role" in item else ""
            raise RowError(f"{place} has no from or no value{other}")
        messages.append(_sharegpt_message(item, place))
    if len(messages) > 1 and messages[0]["role"] == messages[1]["role"] == "system":
        raise RowError("there are two system prompts: the column system and the first of conversations")
    return Conversation(_with_call_ids(messages, "conversations"), _tools(row.get("tools")))


def _sharegpt_message(item: Row, place: str) -> Message:
    role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
    if role is None:
        raise RowError(f"{place}.from is {item['from']!r} (known are {', '.join(SHAREGPT_ROLES)})")
    if role == "function_call":
        calls = _parsed(item["value"], f"{place}.value")
        calls = calls if isinstance(calls, list) else [calls]
        message: Message = {"role": "assistant", "content": "", "tool_calls": _tool_calls(calls, f"{place}.value")}
    elif role == "tool":
        message = {"role": "tool", "content": _result(item["value"], f"{place}.value")}
    else:
        message = {"role": role, "content": _text(item["value"], f"{place}.value")}
    return _checked(message, item, place)


def _read_text(row: Row) -> Conversation:
    text = _text(row["text"], "text")
    if not text.strip():
        raise RowError("text is empty")
    return Conversation(text=text)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    for number, item in enumerate(_list(_parsed(value, name), name)):
        place = f"{name}[{number}]"
        if not isinstance(item, Mapping):
            raise RowError(f"{place} is {kind_of(item)}, not an object with role and content")
        if "role" not in item:
            other = " (it looks like the sharegpt format: from and value)" if "from" in item else ""
            raise RowError(f"{place} has no role{other}")
        if item["role"] not in ROLES:
            raise RowError(f"{place}.role is {item['role']!r} (known are {', '.join(ROLES)})")
        messages.append(_message(item, place))
    return _with_call_ids(messages, name)


def _message(item: Row, place: str) -> Message:
    role = item["role"]
    message: Message = {"role": role}
    if role == "tool":
        message["content"] = _result(item.get("content"), f"{place}.content")
    else:
        calls = _list(_parsed(item.get("tool_calls") or [], f"{place}.tool_calls"), f"{place}.tool_calls")
        if calls and role != "assistant":
            raise RowError(f"{place}: tool_calls belong to an assistant message, not to {role}")
        content = item.get("content")
        message["content"] = "" if content is None and calls else _content(content, f"{place}.content")
        if calls:
            message["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if item.get(key) is not None:
            message[key] = _text(item[key], f"{place}.{key}")
    return _checked(message, item, place)


def _checked(message: Message, item: Row, place: str) -> Message:
    """Honour `train` and `weight` of an assistant message, and refuse an empty answer that would be trained."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{place}.train is {kind_of(train)}, not true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"{place}.weight is {weight!r} (known are 0 and 1)")
    if message["role"] != "assistant":
        return message
    if train is False or weight == 0:
        return {**message, "train": False}
    if not message["content"].strip() and "tool_calls" not in message:
        raise RowError(f"{place}: the assistant says nothing")
    return message


def _answer(value: Any, place: str) -> Message:
    return _checked({"role": "assistant", "content": _text(value, place)}, {}, place)


def _system_column(row: Row) -> list[Message]:
    """The column `system` as the first message, where it has a text."""
    text = _text(row.get("system") or "", "system")
    return [{"role": "system", "content": text}] if text else []


def _content(value: Any, place: str) -> str:
    """Text, or a list of text parts as OpenAI writes them, joined as they stand."""
    if not isinstance(value, list):
        return _text(value, place)
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise RowError(f"{place}[{number}] is a part of type {kind!r}: only text is trained on")
        texts.append(_text(part.get("text"), f"{place}[{number}].text"))
    return "".join(texts)


def _result(value: Any, place: str) -> str:
    """What a tool gave back: text as it is, parts joined, anything else as JSON."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return _content(value, place)
    if isinstance(value, dict | list | int | float):
        return json_text(value, place)
    return _text(value, place)


def _tool_calls(calls: list[Any], place: str) -> list[dict[str, Any]]:
    found = []
    for number, call in enumerate(calls):
        where = f"{place}[{number}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{where} is not a tool call: an object with name and arguments")
        arguments = _parsed(function.get("arguments") or {}, f"{where}.arguments")
        if not isinstance(arguments, Mapping):
            raise RowError(f"{where}.arguments is {kind_of(arguments)}, not an object")
        json_text(arguments, f"{where}.arguments")
        name_and_arguments = {"name": function["name"], "arguments": dict(arguments)}
        identity = {"id": _text(call["id"], f"{where}.id")} if call.get("id") is not None else {}
        found.append({"type": "function", **identity, "function": name_and_arguments})
    return found


def _with_call_ids(messages: list[Message], name: str) -> tuple[Message, ...]:
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


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """The tools column: a list, or JSON text of one; bare functions get the wrapper that templates expect."""
    tools = _list(_parsed(value, "tools"), "tools") if value not in (None, "") else []
    found = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{number}] is not a tool: an object with name, description and parameters")
        json_text(tool, f"tools[{number}]")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(found) or None


def _parsed(value: Any, place: str) -> Any:
    """JSON text (as in CSV cells and in ShareGPT) parsed, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except RowError as error:
        raise RowError(f"{place} is text that is not JSON: {error.reason}") from None


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RowError(f"{place} is {kind_of(value)}, not a list")
    return list(value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{place} is {kind_of(value)}, not text")
    return value


_READERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _read_messages,
    "prompt-completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "sharegpt": _read_sharegpt,
    "text": _read_text,
}
