"""The shapes in which a chat template may want a tool call, and messages put into the one that it writes.

One call has many spellings: no words as empty text, as none or as no key at all; arguments as an object or as JSON
text; ids of the caller's own, of nine letters (Mistral's), or none; wrapped into `function` or not. A template writes
some of them and drops or refuses the others. `best_shape` tries them once, on a small conversation, for calls with and
without words and reasoning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from qlora.data.formats import Message

# Private-use characters: they stand in no template, survive trimming, and differ from an answer's first character.
PLACEHOLDERS = ("\ue0a1ANSWER\ue0a1", "\ue0b2ANSWER\ue0b2")
CALL_ID = "call00000"
# Names that a message's reasoning goes by. Templates read the first one, gpt-oss's and LFM2's read the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NINE = re.compile(r"[A-Za-z0-9]{9}")
# Three marks of a call that is written: its name, an argument's value, and what stands beside it.
_NAME, _VALUE = PLACEHOLDERS
_WORDS, _THOUGHTS = "\ue0c3WORDS\ue0c3", "\ue0d4THOUGHTS\ue0d4"
_OWN_ID = "call_of_another_length_1"  # as servers make them up: longer than nine, with a line below

THINK = re.compile(r"\s*<think>\n*(.*?)\n*</think>\s*(.*)", re.DOTALL)  # an answer that holds its reasoning


@dataclass(frozen=True)
class CallShape:
    """How calls are given to a template. `content`: what stands there, "null" and "absent" leave words out."""

    content: str = "as it is"  # "as it is" (empty text without words) | "null" | "absent"
    arguments: str = "object"  # "object" | "text"
    ids: str = "own"  # "own" | "nine" | "none"
    wrapped: bool = True


SHAPES = tuple(
    CallShape(content, arguments, ids, wrapped)
    for ids, wrapped, arguments, content in product(
        ("own", "nine", "none"), (True, False), ("object", "text"), ("as it is", "null", "absent")
    )
)
Kind = tuple[bool, bool]  # whether words and whether reasoning stand beside the call
KINDS: tuple[Kind, ...] = ((False, False), (True, False), (False, True), (True, True))
Shapes = Mapping[Kind, CallShape]
DEFAULT_SHAPES: Shapes = dict.fromkeys(KINDS, CallShape())


def kind_of_call(message: Message) -> Kind:
    return bool(message["content"].strip()), bool(message.get("reasoning_content"))


def best_shape(
    kind: Kind,
    question: Message,
    render: Callable[[Sequence[Message], Shapes], str | None],
    shapes: Sequence[CallShape],
) -> tuple[CallShape, bool | None]:
    """The first shape of which most is written, and whether the call is: None where every shape is refused.

    `render` gives the text of a conversation whose calls have the given shapes, None where the template refuses it.
    """
    message = _probe(kind)
    best, best_score, refused = shapes[0], 0, True
    for shape in shapes:
        text = render([question, message], {kind: shape})
        refused = refused and text is None
        spelled_none = shape.content == "null" and "None" in (text or "")  # written where words would stand
        score = 0 if spelled_none else _score(text or "", kind)
        if score > best_score:
            best, best_score = shape, score
        if best_score == 1 + sum(kind):
            break
    return best, None if refused else best_score > 0


def _probe(kind: Kind) -> Message:
    words, thoughts = kind
    call = {"type": "function", "id": _OWN_ID, "function": {"name": _NAME, "arguments": {"key": _VALUE, "on": True}}}
    message: Message = {"role": "assistant", "content": _WORDS if words else "", "tool_calls": [call]}
    return {**message, "reasoning_content": _THOUGHTS} if thoughts else message


def _score(text: str, kind: Kind) -> int:
    """How much of a call is written; 0 without its name and arguments.

    Python's spelling of an object, which is no JSON, escapes these characters: it counts as not written.
    """
    if _NAME not in text or _VALUE not in text:
        return 0
    return 1 + (kind[0] and _WORDS in text) + (kind[1] and _THOUGHTS in text)


@dataclass(frozen=True)
class Reading:
    """How a template takes messages. `shapes` of calls; `parts`: content as a list of parts (vision models' templates).

    `inline_thoughts`: True puts reasoning into the answer's text (a template that writes it only there), False takes it
    out of it (one that reads it only under its own key), None leaves it where it is.
    """

    shapes: Shapes = field(default_factory=lambda: DEFAULT_SHAPES)
    inline_thoughts: bool | None = None
    parts: bool = False


def as_templates_read_it(messages: Sequence[Message], reading: Reading) -> list[Message]:
    """Messages without our own key, calls in their shapes, and reasoning under the names that templates read."""
    shapes, inline_thoughts = reading.shapes, reading.inline_thoughts
    new_ids: dict[str, str] = {}
    nine = any(shape.ids == "nine" for shape in shapes.values())
    read = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key != "train"}
        if plain["role"] == "assistant" and inline_thoughts is not None:
            plain = _inlined(plain) if inline_thoughts else _taken_out(plain)
        kind = kind_of_call(plain) if "tool_calls" in plain else (False, False)
        reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        if "tool_calls" in plain:
            plain = _shaped(plain, shapes.get(kind, CallShape()), new_ids)
        elif nine and "tool_call_id" in plain:
            plain["tool_call_id"] = _nine(plain["tool_call_id"], new_ids)
        if reading.parts and plain.get("content") is not None:
            plain["content"] = [{"type": "text", "text": plain["content"]}]
        read.append(plain)
    return read


def _shaped(message: Message, shape: CallShape, new_ids: dict[str, str]) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if shape.arguments == "text":
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        ids = {} if shape.ids == "none" or "id" not in call else {"id": call["id"]}
        if shape.ids == "nine" and ids:
            ids = {"id": _nine(call["id"], new_ids)}
        calls.append({"type": call["type"], **ids, "function": function} if shape.wrapped else {**ids, **function})
    shaped = {**message, "tool_calls": calls}
    if shape.content == "null":
        shaped["content"] = None
    elif shape.content == "absent":
        del shaped["content"]
    return shaped


def _nine(given: str, new_ids: dict[str, str]) -> str:
    """An id of nine letters and digits, the same one wherever the given one stands in the conversation."""
    if _NINE.fullmatch(given):
        return given
    return new_ids.setdefault(given, f"id{len(new_ids):07d}")


def thoughts_of(message: Message) -> str:
    """An answer's reasoning, from its own key or out of its text; "" where it has none."""
    inside = THINK.fullmatch(message["content"])
    return str(message.get("reasoning_content") or (inside[1] if inside else "")).strip()


def words_of(message: Message) -> str:
    """An answer's text without the reasoning in it."""
    inside = THINK.fullmatch(message["content"])
    return str(inside[2] if inside else message["content"]).strip()


def without_thoughts(message: Message) -> Message:
    inside = THINK.fullmatch(message["content"])
    plain = {key: value for key, value in message.items() if key not in _REASONING}
    return {**plain, "content": inside[2]} if inside else plain


def _inlined(message: Message) -> Message:
    thoughts = message.get("reasoning_content")
    if not thoughts or THINK.fullmatch(message["content"]):
        return message
    plain = {key: value for key, value in message.items() if key not in _REASONING}
    return {**plain, "content": f"<think>\n{thoughts.strip()}\n</think>\n\n{message['content']}"}


def _taken_out(message: Message) -> Message:
    inside = THINK.fullmatch(message["content"])
    if not inside or message.get("reasoning_content"):
        return message
    return {**message, "content": inside[2], "reasoning_content": inside[1]}
