"""Rows of the known formats to conversations.

A conversation is a tuple of messages in the form that chat templates read: `role`, `content` (always text), and
where there are any `tool_calls` (arguments as an object, never as a JSON string), `tool_call_id`, `name`,
`reasoning_content`. One key of ours is added: `train = False` on an assistant message whose tokens are context
only. What a row says is kept to the letter; what cannot be understood raises RowError, never a guess; what nothing
reads is a remark. The words of other exports stand in `column_words`, `role_words`, `turns`, `calls` and `marks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.data.calls import Message, Tools
from qlora.data.column_words import FORMAT_COLUMNS, check_preference, column_names, is_turns, lone_text, suggestion
from qlora.data.marks import check_media, check_rating, check_row_switches
from qlora.data.parts import TEXT, parts_of
from qlora.data.row_json import RowError, is_blank, kind_of, list_of, parsed, text_of
from qlora.data.turns import REASONING_KEYS, Turns, answer, answered, reasoning_of
from qlora.data.unread import Fields, Ledger, Remark

__all__ = ["Conversation", "Message", "Tools", "to_conversation"]

Row = Mapping[str, Any]
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction", "preamble")


@dataclass(frozen=True)
class Conversation:
    """One row to learn from: messages (with the tools they may call), or one plain text trained whole.

    `remarks`: what there is to say of how it was read; no part of what is learned.
    """

    messages: tuple[Message, ...] = ()
    tools: Tools | None = None
    text: str | None = None
    remarks: tuple[Remark, ...] = field(default=(), compare=False)


def to_conversation(row: Row, format: str) -> Conversation:
    """Read one row as the given format. Raises RowError."""
    missing = [column for column in FORMAT_COLUMNS[format] if row.get(column) is None]
    if missing:
        has = column_names([key for key in row if row[key] is not None])
        reason = f"{format} needs the column {' and '.join(missing)}; this row has: {has}"
        raise RowError(reason, file_hint=suggestion(row))
    ledger = Ledger()
    fields, turns = ledger.open(row), Turns(ledger)
    if format == "text":
        check_media(fields)
        return Conversation(text=_plain_text(fields), remarks=ledger.remarks())
    check_row_switches(fields)
    check_rating(fields)
    turns.add_tools(fields.get("tools", "functions"), "tools")
    messages = _READERS[format](fields, turns)
    check_media(fields, [message["content"] for message in messages])
    if messages[-1]["role"] != "assistant":
        check_preference(row)  # the better answer is the one that is missing
    return Conversation(messages, turns.tools, remarks=ledger.remarks())


def _plain_text(row: Fields) -> str:
    text = text_of(row.take("text"), "text")
    if not text.strip():
        raise RowError("text is empty")
    return text


def _read_messages(row: Fields, turns: Turns) -> tuple[Message, ...]:
    return _with_system(row, turns, turns.read(row.take("messages"), "messages"), "messages")


def _read_sharegpt(row: Fields, turns: Turns) -> tuple[Message, ...]:
    return _with_system(row, turns, turns.read(row.take("conversations"), "conversations"), "conversations")


def _read_prompt_completion(row: Fields, turns: Turns) -> tuple[Message, ...]:
    prompt, completion = lone_text(row.take("prompt")), lone_text(row.take("completion"))
    before: tuple[Message, ...]
    is_text = isinstance(prompt, str) and not is_turns(prompt)
    if is_text:
        before = ({"role": "user", "content": prompt},)
    else:
        # A prompt's assistant turns are context, whatever their own `train` says.
        before = tuple(
            {**message, "train": False} if message["role"] == "assistant" else message
            for message in turns.read(prompt, "prompt")
        )
    before = _with_system(row, turns, (*_history(row, turns), *before), "prompt")
    if isinstance(completion, Mapping):
        completion = [completion]
    # An answer may be JSON itself, and is turns only where its question is.
    if is_turns(completion) and not (is_text and isinstance(completion, str)):
        return before + turns.read(completion, "completion")
    return (*before, _with_reasoning(answer(completion, "completion"), row))


def _read_alpaca(row: Fields, turns: Turns) -> tuple[Message, ...]:
    instruction = text_of(row.take("instruction"), "instruction")
    given = text_of(row.get("input", "context") or "", "input")
    asked = {"role": "user", "content": f"{instruction}\n{given}" if given else instruction}
    said = _with_reasoning(answer(row.take("output"), "output"), row)
    return _with_system(row, turns, (*_history(row, turns), asked, said), "history")


def _history(row: Fields, turns: Turns) -> tuple[Message, ...]:
    """Turns before the last question: pairs of question and answer, or messages."""
    messages: list[Message] = []
    for number, pair in enumerate(list_of(parsed(row.get("history"), "history") or [], "history")):
        place = f"history[{number}]"
        if isinstance(pair, Mapping):
            messages += turns.turn(pair, place)
            continue
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"{place} is not a pair of question and answer")
        messages.append({"role": "user", "content": text_of(pair[0], f"{place}[0]")})
        messages.append(answered({"role": "assistant", "content": text_of(pair[1], f"{place}[1]")}, f"{place}[1]"))
    return tuple(messages)


def _with_reasoning(message: Message, row: Fields) -> Message:
    """An answer of a column, with the thoughts that stand in a column of their own."""
    # Some sets (Nemotron's) tell by `reasoning` only whether there is any.
    if any(row.peek(key) in ("on", "off", True, False) for key in REASONING_KEYS):
        return message
    reasoning = reasoning_of(row)
    return message if is_blank(reasoning) else {**message, "reasoning_content": reasoning}


def _with_system(row: Fields, turns: Turns, messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The messages behind the system prompt of a column, where it has a text."""
    value = row.get(*_SYSTEM_COLUMNS)
    if isinstance(value, Mapping):  # Gemini's
        parts = turns.ledger.open(value, "system")
        parts.take("role")
        value = parts.take("parts")
    if isinstance(value, list):
        texts = list(parts_of(value, "system", turns.ledger))
        if any(part.kind != TEXT for part in texts):
            raise RowError("system holds a part that is no text")
        value = "".join(part.value for part in texts)
    if value in (None, ""):
        return messages
    if not isinstance(value, str):
        raise RowError(f"system is {kind_of(value)}, not text")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == value:
            return messages
        what = f"there are two system prompts: the column system and the first of {name}"
        raise RowError(what, file_hint='columns = { ignored_system = "system" } passes over the column')
    return ({"role": "system", "content": value}, *messages)


_READERS: dict[str, Callable[[Fields, Turns], tuple[Message, ...]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt-completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
}
