"""A model behind OpenAI's chat protocol: chat completions, whole or streamed, and the list of models.

One answer is written at a time; what was computed of the last conversation is kept, so that the next message of it pays
for itself alone.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import unquote

from qlora.ask.keeping import row_of
from qlora.ask.llama import LlamaModel
from qlora.ask.opened import TorchModel
from qlora.ask.requests import MAX_BODY_BYTES, ChatRequest, RequestError, read_request
from qlora.ask.settings import Sampling
from qlora.ask.talk import prompt_of
from qlora.ask.thoughts import opened_block
from qlora.ask.transport import Gone, Handler, Line, LocalServer
from qlora.ask.writing import Writing
from qlora.errors import DataError, DoesNotFit, QloraError
from qlora.events import Notice, Sink
from qlora.guarded import Guarded
from qlora.model.cpu_matmul import fast_matmul

MAX_WAITING = 8
_END_SECONDS = 30.0  # for an answer under way to end, a piece of a prompt at most
_MAX_REASON = 600  # characters of an error that is none of ours
_MEMORY_HINT = "end other programs that hold memory, ask something shorter, or open it with a smaller context"


def serve(server: LocalServer, opened: TorchModel | LlamaModel, defaults: Sampling, system: str, sink: Sink) -> None:
    """Answer until an exception ends it (Ctrl-C): then the answer under way is ended as well.

    `defaults`, and a `system` prompt where there is one, hold for what a request leaves open.
    """
    service = _Service(opened, defaults, system, sink)
    server.answer, server.report_fault = service.answer, service.report_fault
    server.listen()
    url = f"http://{server.names[0]}/v1"
    sink.emit(Notice("serve", f"{service.name} is served at {url}, to programs on this machine alone; Ctrl-C ends it"))
    try:
        server.serve_forever()
    finally:
        server.is_ending = True
        server.server_close()
        service.line.is_empty(_END_SECONDS)


class _Service:
    """The model, and who waits for it."""

    def __init__(self, opened: TorchModel | LlamaModel, defaults: Sampling, system: str, sink: Sink) -> None:
        self.name = opened.name
        self.line = Line(MAX_WAITING)
        self._opened, self._defaults, self._system, self._sink = opened, defaults, system, sink
        self._row = row_of(opened)
        self._began = int(time.time())
        self._says = threading.Lock()

    def answer(self, handler: Handler) -> None:
        """Raises RequestError, Gone."""
        path = unquote(handler.path.partition("?")[0])  # a model of the hub has a slash in its name
        wanted = "POST" if path == "/v1/chat/completions" else "GET"
        if path not in ("/v1/chat/completions", "/v1/models", f"/v1/models/{self.name}"):
            what = f"there is no {path[:80]}: /v1/chat/completions and /v1/models are answered"
            raise RequestError(what, code="not_found", status=404)
        if handler.command != wanted:
            handler.close_connection = True
            raise RequestError(f"{path} takes {wanted} alone", code="method_not_allowed", status=405)
        if path == "/v1/models":
            handler.send_json(200, {"object": "list", "data": [self._model()]})
        elif wanted == "GET":
            handler.send_json(200, self._model())
        else:
            self._complete(handler)

    def report_fault(self, error: BaseException | None) -> RequestError:
        """Say all of it here, where the user looks: a client is not told the names of folders."""
        why = f"{error.what}: {error.hint}" if isinstance(error, QloraError) else f"{type(error).__name__}: {error}"
        self._say(f"a request was not answered: {why[:_MAX_REASON]}")
        if isinstance(error, DoesNotFit):
            what = "there is not enough memory for this answer: ask something shorter, or try again later"
            return RequestError(what, code="out_of_memory", status=503)
        what = "the model failed over this answer, and the screen of the server says why"
        return RequestError(what, code="model_failed", status=500)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._began, "owned_by": "qlora"}

    def _complete(self, handler: Handler) -> None:
        request = read_request(handler.body(MAX_BODY_BYTES), self.name, self._defaults)
        shape = _Shape(self.name, request)
        headers = {"X-Ignored-Parameters": ", ".join(request.ignored)} if request.ignored else {}
        with self.line.turn(handler.is_gone), self._computing():
            begun, text = time.perf_counter(), ""
            try:
                writing = self._writing(request)
                writing.stopped = handler.is_gone
                if request.stream:
                    handler.begin_events(headers)
                    self._stream(handler, shape, writing)
                else:
                    text = "".join(self._pieces(writing))
            finally:
                self._row.check = lambda: None  # which holds the connection
        seconds = time.perf_counter() - begun
        if writing.finish == "interrupted":
            raise Gone
        if not request.stream:
            handler.send_json(200, shape.whole(text, writing), headers)
        told = f"{len(writing.prompt):,} tokens read ({writing.reused:,} kept from before)"
        self._say(f"{told}, {len(writing.tokens):,} written in {seconds:.1f} s: {writing.finish}")

    def _computing(self) -> AbstractContextManager[None]:
        """How the CPU multiplies holds for a thread, and each request has its own."""
        opened = self._opened
        return fast_matmul(opened.device) if isinstance(opened, TorchModel) else nullcontext()

    def _writing(self, request: ChatRequest) -> Writing:
        """The answer, not begun yet. Raises RequestError for a conversation that cannot be answered."""
        messages = request.messages
        if self._system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        try:
            prompt = prompt_of(self._opened, messages)
        except DataError as error:  # anything else is no fault of the messages
            raise RequestError(error.what, "messages", "invalid_value") from error
        if len(prompt) >= self._opened.context:
            what = f"the conversation has {len(prompt):,} tokens, and the context holds {self._opened.context:,}"
            raise RequestError(what, "messages", "context_length_exceeded")
        return Writing(self._opened, self._row, prompt, request.sampling, stops=request.stops)

    def _stream(self, handler: Handler, shape: _Shape, writing: Writing) -> None:
        handler.send_event(shape.chunk({"role": "assistant", "content": ""}))
        for piece in self._pieces(writing):
            handler.send_event(shape.chunk({"content": piece}))
        if writing.finish == "interrupted":
            return
        handler.send_event(shape.chunk({}, writing.finish))
        if shape.request.include_usage:
            handler.send_event(shape.usage_chunk(writing))
        handler.send_event("[DONE]")

    def _pieces(self, writing: Writing) -> Iterator[str]:
        """The answer's text; with the mark before its thoughts where the prompt wrote that."""
        block = opened_block(self._opened, writing.prompt)
        with Guarded("answering", _MEMORY_HINT):
            if block is not None:
                yield f"{block[0]}\n"
            yield from writing

    def _say(self, message: str) -> None:
        with self._says:
            self._sink.emit(Notice("serve", message))


class _Shape:
    """OpenAI's objects of one answer."""

    def __init__(self, model: str, request: ChatRequest) -> None:
        self.request = request
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, writing: Writing) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": writing.finish}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(writing)}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return json.dumps(self._chunk([choice], None))

    def usage_chunk(self, writing: Writing) -> str:
        return json.dumps(self._chunk([], _usage(writing)))

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        said = {"usage": usage} if self.request.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **said}


def _usage(writing: Writing) -> dict[str, Any]:
    read, written = len(writing.prompt), len(writing.tokens)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": writing.reused},
    }
