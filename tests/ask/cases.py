"""What tests of asking share: a model that answers by a table, and a served one with a client."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora.ask.llama import LlamaChat, LlamaModel, _Tokens
from qlora.ask.server import serve
from qlora.ask.settings import Sampling
from qlora.ask.transport import LocalServer
from qlora.data.template import ChatTemplate
from qlora.events import Recorder
from tests.families import CHATML

START, END, LETTERS = 256, 257, 258
_SPECIALS = {"<|im_start|>": START, "<|im_end|>": END}
GREEDY = Sampling(temperature=0)


class ToyLlama:
    """What `export/llama_cpp/live.py` is to us, with a byte a token and answers out of a function.

    `computed` counts the tokens of each call; `stays` False makes it forget a row that is cut.
    """

    def __init__(self, answer: Callable[[str], str] = lambda question: f"[{question}]", template: str = CHATML) -> None:
        self.file = Path("/models/toy.gguf")
        marked = [(token, text, True) for text, token in _SPECIALS.items()]
        self.about: dict[str, Any] = {
            "tokens": LETTERS, "end_ids": [END], "chat_template": template, "context": 400,
            "bos": -1, "eos": END, "add_bos": False, "marked": marked,
        }  # fmt: skip
        self.answer = answer
        self.stays = True
        self.row: list[int] = []
        self.computed: list[int] = []
        self.before_each: Callable[[], None] = lambda: None

    def tokenize(self, text: str) -> list[int]:
        parts = re.split(r"(<\|im_start\|>|<\|im_end\|>)", text)
        return [token for part in parts for token in ([_SPECIALS[part]] if part in _SPECIALS else part.encode())]

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < START else b""

    def extend(self, ids: Sequence[int], start: int, wanted: bool) -> NDArray[np.float32] | None:
        self.before_each()
        assert start <= len(self.row)
        if 0 < start < len(self.row) and not self.stays:
            self.row = []
            return None
        self.row = [*self.row[:start], *ids]
        self.computed.append(len(ids))
        logits_V = np.zeros(LETTERS, dtype=np.float32)
        logits_V[self._next()] = 100.0
        return logits_V if wanted else logits_V[:0]

    def _next(self) -> int:
        text = bytes(token for token in self.row if token < START or token == 0)
        marks = [at for at, token in enumerate(self.row) if token == START]
        asked = bytes(token for token in self.row[marks[-2] + 1 : marks[-1]] if token < START).decode()
        answer = self.answer(asked.strip().removeprefix("user\n")).encode()
        written = len(self.row) - marks[-1] - 1 - len(b"assistant\n")
        assert text and written >= 0
        return answer[written] if written < len(answer) else END


@cache
def _rendering(template: str) -> ChatTemplate:
    return ChatTemplate(_Tokens(ToyLlama(template=template).about), Recorder())  # type: ignore[arg-type]


def toy_model(live: ToyLlama | None = None) -> LlamaModel:
    live = live or ToyLlama()
    chat = LlamaChat(live, Recorder())  # type: ignore[arg-type]
    if chat.template:
        vars(chat)["_rendering"] = _rendering(chat.template)  # a process renders each: one will do
    return LlamaModel("toy.gguf", live.file, live, chat, int(live.about["context"]))  # type: ignore[arg-type]


@contextmanager
def served(live: ToyLlama, defaults: Sampling = GREEDY, system: str = "") -> Iterator[tuple[LocalServer, Recorder]]:
    """The toy model behind a port of its own."""
    server, sink = LocalServer(0), Recorder()
    work = threading.Thread(target=serve, args=(server, toy_model(live), defaults, system, sink), daemon=True)
    work.start()
    while not sink.of("notice"):  # it listens from then on
        time.sleep(0.01)
    try:
        yield server, sink
    finally:
        server.shutdown()
        work.join(20)
        assert not work.is_alive()


def call(server: LocalServer, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request; a GET without a body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {} if data is None else {"Content-Type": "application/json"}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, {**kind, **names})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
