"""What a client of OpenAI's chat protocol asks: read, bounded, and refused by name where it cannot be done as asked.

What changes an answer and is not done here is refused, with the parameter's name in OpenAI's shape of an error: an
answer that looks as asked and is not would be worse. What changes none is let pass, and named in the answer's header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora import foreign_json
from qlora.ask.settings import Sampling, changed
from qlora.data.formats import Message
from qlora.errors import UserError
from qlora.foreign_json import ForeignFileError

MAX_BODY_BYTES = 4 << 20  # a context of a million tokens is as much
MAX_MESSAGES = 4_000
MAX_STOPS, MAX_STOP_CHARS = 4, 200  # OpenAI's own number of them
MAX_NAME_CHARS = 200
_IGNORED = frozenset(
    (
        *("user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls"),
    )
)
# What changes an answer, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_READ = (*_SAMPLING, "model", "messages", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_KEYS = ("role", "content", "name", "reasoning_content")


class RequestError(Exception):
    """A request that is not answered. `body` is OpenAI's shape of it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """One question. `ignored`: names of parameters that change no answer."""

    messages: list[Message]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...]


def read_request(data: bytes, served: str, defaults: Sampling) -> ChatRequest:
    """The request in a body. `served` is the model's name, `defaults` hold where the request says nothing.

    Raises RequestError.
    """
    try:
        body = foreign_json.parse_object(data, "the request")
    except ForeignFileError as error:
        raise RequestError(str(error), code="invalid_json") from error
    given = {name: value for name, value in body.items() if value is not None}  # null is as good as nothing
    _check_names(given)
    if (model := given.get("model", served)) != served:
        what = f"the model {str(model)[:80]!r} is not served: {served!r} is"
        raise RequestError(what, "model", "model_not_found", 404)
    stream = _boolean(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", "an object with include_usage")
    if options and not stream:
        raise RequestError("stream_options needs stream = true", "stream_options", "invalid_value")
    return ChatRequest(
        messages=_messages(given.get("messages")),
        sampling=_sampling(given, defaults),
        stops=_stops(given.get("stop", ())),
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
        ignored=tuple(name for name in given if name in _IGNORED),
    )


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL:
            # In Python True is 1 and False is 0; in JSON they are not.
            neutral = _NEUTRAL[name]
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
                what = f"{name} is not supported, but for {json.dumps(neutral[0])}"
                raise RequestError(what, name, "unsupported_value")
        elif name not in _READ and name not in _IGNORED:
            raise RequestError(f"{name[:80]} is not known here", name[:80], "unsupported_parameter")


def _sampling(given: Mapping[str, Any], defaults: Sampling) -> Sampling:
    lengths = {name: given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len({repr(value) for value in lengths.values()}) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ", "max_tokens", "invalid_value")
    sampling = defaults
    for name in (*_SAMPLING, *lengths):
        if name in given:
            key = "max_tokens" if name in lengths else name
            sampling = _changed(sampling, key, name, given[name])
    return sampling


def _changed(sampling: Sampling, key: str, name: str, value: Any) -> Sampling:
    whole = key in ("top_k", "max_tokens", "seed")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _wrong(name, "a whole number" if whole else "a number")
    try:
        return changed(sampling, **{key: value})
    except (UserError, OverflowError) as error:
        hint = error.hint if isinstance(error, UserError) else "it is too large"
        raise RequestError(f"{name} is out of its bounds: {hint}", name, "invalid_value") from error


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of messages")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"more than {MAX_MESSAGES:,} messages", "messages", "too_many_messages")
    return [_message(item, f"messages[{number}]") for number, item in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong(place, "an object with role and content")
    keys = {key: value for key, value in item.items() if value not in (None, [], {})}
    role = keys.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{place}.role", "one of " + ", ".join(_ROLES))
    if unknown := [key for key in keys if key not in _MESSAGE_KEYS]:
        name = f"{place}.{unknown[0][:80]}"
        raise RequestError(f"{name} is not supported", name, "unsupported_parameter")
    message: Message = {"role": _ROLES[role], "content": _content(keys.get("content"), f"{place}.content")}
    for key in ("name", "reasoning_content"):
        if key in keys:
            if not isinstance(keys[key], str) or (key == "name" and len(keys[key]) > MAX_NAME_CHARS):
                raise _wrong(f"{place}.{key}", "a text")
            message[key] = keys[key].encode("utf-8", "replace").decode()  # half a letter is no text
    return message


def _content(value: Any, place: str) -> str:
    """Text, or the texts of a list of parts."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise _wrong(place, "text, or a list of parts of text")
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"{place}[{number}]: only parts of type text are read"
            raise RequestError(what, f"{place}[{number}]", "unsupported_value")
        texts.append(part["text"])
    # Escapes of half a letter (\ud800), which no tokenizer takes.
    return "".join(texts).encode("utf-8", "replace").decode("utf-8")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong("stop", "a text, or a list of texts")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        what = f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
        raise RequestError(what, "stop", "invalid_value")
    return tuple(stops)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return bool(value)


def _wrong(place: str, wanted: str) -> RequestError:
    return RequestError(f"{place} must be {wanted}", place, "invalid_type")
