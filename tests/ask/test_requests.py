"""Requests are read in OpenAI's words; what would change the answer and is not done is refused by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.ask.requests import MAX_MESSAGES, RequestError, read_request
from qlora.ask.settings import Sampling
from tests.ask.cases import user

HI = [user("hi")]


def read(**body: Any) -> Any:
    return read_request(json.dumps({"messages": HI, **body}).encode(), "tiny", Sampling())


def test_what_is_asked_is_read() -> None:
    asked = read(
        model="tiny", temperature=0, top_p=0.5, seed=3, max_completion_tokens=7, stop="END", stream=True,
        stream_options={"include_usage": True}, user="me", metadata={"a": "b"}, n=1, frequency_penalty=0.0, tools=[],
        logprobs=False, response_format={"type": "text"}, logit_bias=None,
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\ud800"}]},
            {"role": "assistant", "content": "c", "tool_calls": None},
        ],
    )  # fmt: skip
    assert asked.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab?"},
        {"role": "assistant", "content": "c"},
    ]
    assert asked.sampling == Sampling(temperature=0, top_p=0.5, seed=3, max_tokens=7)
    assert asked.stops == ("END",) and asked.stream and asked.include_usage and asked.ignored == ("user", "metadata")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "gpt-5"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [user("x")] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**body)
    error = refused.value.body["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"] and error["message"]
    assert refused.value.status in (400, 404)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", b'{"messages": 1e999}']
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        read_request(data, "tiny", Sampling())
    assert refused.value.status == 400
