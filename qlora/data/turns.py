"""Turns of a conversation, in any export's words, to the messages that chat templates read.

One reader for all formats: who speaks stands under `role`, `from`, `sender`, `speaker` or `author`, what is said under
`content`, `value`, `text`, `message` or `parts`; a turn without a role may be `{"user": …, "assistant": …}` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora.data.calls import Message, Tools, calls_of_text, result_text, tool_calls, tools_of, with_call_ids
from qlora.data.marks import check_media, check_rating, trained
from qlora.data.parts import CALL, RESULT, TEXT, THOUGHT, parts_of
from qlora.data.role_words import KNOWN_ROLES, ROLE_WORDS, role_of, said_by
from qlora.data.row_json import RowError, is_blank, kind_of, list_of, object_of, parsed, text_of
from qlora.data.unread import Fields, Ledger

ROLE_KEYS = ("role", "from", "sender", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message", "parts")
# All are read as the first, which templates know.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
# What a message keeps beside these, and the names that it comes under.
_KEPT = {"name": ("name", "tool_name"), "tool_call_id": ("tool_call_id", "tool_use_id", "call_id")}
_USUAL_ROLES = {word: role for role in ("system", "user", "assistant") for word in ROLE_WORDS[role]}
_ROLE_HINT = "write the role of each turn as system, user, assistant or tool"


class Turns:
    """Reads the turns of one row. `tools`: what its messages bring of tools (GLM-4 has them in the system message)."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.tools: Tools | None = None

    def read(self, value: Any, name: str) -> tuple[Message, ...]:
        """The messages of a list of turns (or its JSON text), calls with ids. Raises RowError."""
        value = parsed(value, name)
        if isinstance(value, Mapping) and "messages" in value:  # Langfuse and OpenAI put them into an object
            wrapper = self.ledger.open(value, name)
            value, name = parsed(wrapper.take("messages"), f"{name}.messages"), f"{name}.messages"
            self.add_tools(wrapper.get("tools"), f"{name}.tools")
        messages: list[Message] = []
        for number, item in enumerate(list_of(_transposed(value), name)):
            messages += self.turn(item, f"{name}[{number}]")
        return with_call_ids(messages, name)

    def turn(self, item: Any, place: str) -> list[Message]:
        """One turn: a message, or several where results of tools stand in its parts. Raises RowError."""
        if (usual := _usual(item)) is not None:
            return [answered(usual, place)]
        values = object_of(item)
        if values is None:
            hint = 'write each turn as an object: {"role": "user", "content": "…"}'
            raise RowError(f"{place} is {kind_of(item)}, not an object with role and content", file_hint=hint)
        fields = self.ledger.open(values, place)
        key = next((key for key in ROLE_KEYS if not is_blank(values.get(key))), None)
        if key is None and role_of(values.get("type")) is not None:
            key = "type"  # LangChain's
        if key is None:
            return self._said_by_key(fields)
        role = role_of(fields.take(key))
        if role is None:
            raise RowError(f"{place}.{key} is {values[key]!r} (known are {KNOWN_ROLES})", file_hint=_ROLE_HINT)
        if values.get("type") == "message":
            fields.take("type")
        self.add_tools(fields.get("tools") if role == "system" else None, f"{place}.tools")
        check_media(fields, [text for text in map(values.get, CONTENT_KEYS) if isinstance(text, str)])
        return self._messages(fields, role)

    def add_tools(self, value: Any, place: str) -> None:
        """Tools that stand elsewhere than in their column. Raises RowError for others than the row has already."""
        tools = tools_of(value, place)
        if tools and self.tools not in (None, tools):
            raise RowError(f"{place} are other tools than those of the row", "keep one of the two")
        self.tools = self.tools or tools

    def _said_by_key(self, fields: Fields) -> list[Message]:
        """A turn such as {"user": …, "assistant": …} or {"question": …, "answer": …}, in the order of its keys."""
        said = [(said_by(key), key) for key, text in fields.values.items() if isinstance(text, str)]
        found: list[Message] = []
        for role, key in said:
            if role in ("system", "user", "assistant") and not is_blank(text := fields.take(key)):
                found.append(
                    answer(text, fields.where(key)) if role == "assistant" else {"role": role, "content": text}
                )
        if not found:
            raise RowError(f"{fields.place} has no role", file_hint=_ROLE_HINT)
        return found

    def _messages(self, fields: Fields, role: str) -> list[Message]:
        key = next((key for key in CONTENT_KEYS if fields.peek(key) is not None), None)
        content, where = fields.take(key or "content"), fields.where(key or "content")
        if channel := fields.peek("channel"):
            if channel != "final" or role != "assistant":
                hint = "put an analysis under reasoning_content of the answer that it leads to"
                raise RowError(f"{fields.where('channel')} is {channel!r}: only final answers are read", hint)
            fields.take("channel")
        if role == "call":
            calls = calls_of_text(content, where, self.ledger)
            return self._kept({"role": "assistant", "content": "", "tool_calls": calls}, fields)
        if role == "tool":
            if isinstance(content, list) and any(_is_result(part) for part in content):
                return self._of_parts(fields, role, content, where)
            return self._kept({"role": "tool", "content": result_text(content, where)}, fields)
        if isinstance(content, list):
            return self._of_parts(fields, role, content, where)
        calls = self._calls(fields, role)
        message: Message = {"role": role, "content": "" if content is None and calls else text_of(content, where)}
        if calls:
            message["tool_calls"] = calls
        return self._kept(message, fields)

    def _calls(self, fields: Fields, role: str) -> list[dict[str, Any]]:
        """`tool_calls`, or the older `function_call`, of an assistant's message."""
        found = []
        for key in ("tool_calls", "toolCalls", "function_call"):
            where = fields.where(key)
            if is_blank(value := parsed(fields.get(key), where)):
                continue
            if role != "assistant":
                raise RowError(f"{fields.place}: {key} belong to an assistant message, not to {role}")
            calls = [value] if key == "function_call" else list_of(value, where)
            found.append(tool_calls(calls, where, self.ledger))
        if len(found) > 1 and [call["function"] for call in found[0]] != [call["function"] for call in found[1]]:
            raise RowError(
                f"{fields.place}: tool_calls and function_call are not the same calls", "keep one of the two"
            )
        return found[0] if found else []

    def _of_parts(self, fields: Fields, role: str, content: list[Any], where: str) -> list[Message]:
        """A message for each run of text, thoughts and calls, and one for each result of a tool between them."""
        found: list[Message] = []
        open_message: Message | None = None
        for kind, value in parts_of(content, where, self.ledger):
            if kind == RESULT:
                found.append(value)
                open_message = None
                continue
            if open_message is None:
                open_message = {"role": "user" if role == "tool" else role, "content": ""}
                found.append(open_message)
            if kind in (CALL, THOUGHT) and role != "assistant":
                raise RowError(f"{where}: a {kind} belongs to an assistant message, not to {role}")
            if kind == TEXT and "tool_calls" in open_message:
                raise RowError(f"{where} has text behind a call", "put the text before the call, or into the next turn")
            if kind == CALL:
                open_message.setdefault("tool_calls", []).append(value)
            else:
                key = "content" if kind == TEXT else "reasoning_content"
                open_message[key] = open_message.get(key, "") + value
        if not found:
            found.append(open_message := {"role": role, "content": ""})
        if (calls := self._calls(fields, role)) and open_message is not None:
            open_message.setdefault("tool_calls", calls)
        return [message for one in found for message in ([one] if one["role"] == "tool" else self._kept(one, fields))]

    def _kept(self, message: Message, fields: Fields) -> list[Message]:
        """The message with its name, id and reasoning, and what its switches say; refused where it is none."""
        for key, names in _KEPT.items():
            if key not in message and (value := fields.get(*names)) is not None:
                message[key] = text_of(value, fields.where(key))
        if message["role"] == "assistant":
            reasoning = reasoning_of(fields)
            if reasoning is not None and message.setdefault("reasoning_content", reasoning) != reasoning:
                raise RowError(f"{fields.place} has two different reasonings", "keep one of the two")
            check_rating(fields)
        if not trained(fields, message["role"], self.ledger):
            return [{**message, "train": False}]
        return [answered(message, fields.place)]


def _usual(item: Any) -> Message | None:
    """The message of a turn that has a known role and a text and nothing else, as most have; None for any other.

    It is what `turn` would make of it, in a fifth of the time: there is nothing to be looked for.
    """
    if type(item) is dict and len(item) == 2:
        for speaker, said in (("role", "content"), ("from", "value")):
            role, text = item.get(speaker), item.get(said)
            if type(text) is str and type(role) is str and (known := _USUAL_ROLES.get(role)):
                return {"role": known, "content": text}
    return None


def _transposed(value: Any) -> Any:
    """Turns that stand as lists of roles and of contents, as Arrow keeps a sequence of objects, as a list of turns."""
    if not isinstance(value, Mapping) or not any(isinstance(value.get(key), list) for key in ROLE_KEYS):
        return value
    columns = {key: items for key, items in value.items() if isinstance(items, list)}
    if len(columns) < len(value) or len(set(map(len, columns.values()))) != 1:
        return value
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and bool({"tool_use_id", "functionResponse", "function_response"} & set(part))


def reasoning_of(fields: Fields) -> str | None:
    """The thoughts of an answer under any of their names. Raises RowError for two that differ."""
    found = {key: fields.take(key) for key in REASONING_KEYS if fields.peek(key) is not None}
    texts = {key: text_of(value, fields.where(key)) for key, value in found.items()}
    if len({text for text in texts.values() if text.strip()}) > 1:
        raise RowError(f"{' and '.join(map(fields.where, texts))} are two different reasonings", "keep one of the two")
    return max(texts.values(), key=len, default=None)


def answer(value: Any, place: str) -> Message:
    """An assistant's message of a text; a list of one text is that text. Raises RowError."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple):
        raise RowError(f"{place} is a list of {len(value)} answers", f"keep the one answer of each row in {place}")
    return answered({"role": "assistant", "content": text_of(value, place)}, place)


def answered(message: Message, place: str) -> Message:
    """The message. Raises RowError for a trained answer that says nothing."""
    if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise RowError(f"{place}: the assistant says nothing")
    return message
