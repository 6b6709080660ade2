"""A GGUF file to be asked: its own tokens, its own template and end tokens, as a server of it would use them.

Nothing of the file is read here: llama.cpp, in a child, says what it holds. The template is rendered by our own bounded
process, and the text it makes is cut into tokens by llama.cpp.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora.data import spans
from qlora.data.formats import Message
from qlora.data.template import ChatTemplate, Tools
from qlora.errors import TokenizerError
from qlora.events import Sink
from qlora.export.llama_cpp.live import TOKENS_AT_ONCE, Live, open_live


@contextmanager
def open_gguf(file: Path, context: int, sink: Sink) -> Iterator[LlamaModel]:
    """The file, open for the time of the block. `context`: tokens of a row at most. Raises as `open_live` does."""
    with open_live(file, context) as live:
        yield LlamaModel(file.name, file, live, LlamaChat(live, sink), int(live.about["context"]))


@dataclass(frozen=True)
class LlamaModel:
    """A file that llama.cpp holds open. `context`: tokens of a row at most."""

    name: str
    file: Path
    live: Live
    chat: LlamaChat
    context: int

    @property
    def vocabulary(self) -> int:
        return int(self.live.about["tokens"])


class LlamaChat:
    """The file's tokens and chat template, as `ChatTokenizer` is that of a base.

    `template`: None where the file has none. `end_token_ids`: what ends an answer, by the file and by its template.
    """

    def __init__(self, live: Live, sink: Sink) -> None:
        self._live, self._sink = live, sink
        self.template: str | None = live.about["chat_template"] or None

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        by_template = [ids[0] for text in self._rendering.end_tokens if len(ids := self._live.tokenize(text)) == 1]
        return tuple(dict.fromkeys([*by_template, *self._live.about["end_ids"]]))

    def prompt_ids(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        """Tokens of a conversation that the assistant is to continue. Raises RowError."""
        text = self._rendering.render(
            spans.without_shut_thoughts(self._rendering, messages), tools, add_generation_prompt=True
        )
        ids, bos = self._live.tokenize(text), self._live.about["bos"]
        given = next((at for at, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[given:]] if bos >= 0 and (given or self._live.about["add_bos"]) else ids

    def decoder(self) -> ByteDecoder:
        """For one answer."""
        return ByteDecoder(self._live.piece)

    @cached_property
    def _rendering(self) -> ChatTemplate:
        if self.template is None:
            raise TokenizerError(f"{self._live.file}: has no chat template", "export it from a model that has one")
        return ChatTemplate(_Tokens(self._live.about), self._sink)  # type: ignore[arg-type]


class ByteDecoder:
    """Tokens to text, a letter only when its last byte is there. `piece` gives the bytes of a token."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: int) -> str:
        return self._decoder.decode(self._piece(token))

    def rest(self) -> str:
        """What is left of a letter whose end never came."""
        return self._decoder.decode(b"", final=True)


class LlamaRow:
    """One row of tokens in the file's memory; see `keeping.TorchRow`."""

    def __init__(self, live: Live, check: Callable[[], None] = lambda: None) -> None:
        self._live = live
        self._held: list[int] = []
        self.check = check
        self.reused = 0

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (V,) of the token behind `ids`."""
        common = common_length(self._held, ids)
        self.reused = start = min(common, len(ids) - 1)
        logits_V = None
        while start < len(ids):
            self.check()
            until = min(len(ids), start + TOKENS_AT_ONCE)
            self._held = self._held[:start]
            logits_V = self._live.extend(ids[start:until], start, until == len(ids))
            if logits_V is None:  # it cannot go on from here
                self.reused = start = 0
                continue
            self._held = list(ids[:until])
            start = until
        assert logits_V is not None
        return logits_V


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two rows begin with."""
    shorter = min(len(held), len(ids))
    return next((at for at in range(shorter) if held[at] != ids[at]), shorter)


class _Marked:
    """A token of its own, as `ChatTemplate` reads it of a tokenizer of transformers."""

    def __init__(self, text: str, special: bool) -> None:
        self.text, self.special = text, special

    def __str__(self) -> str:
        return self.text


class _Tokens:
    """What `ChatTemplate` asks a tokenizer of transformers, answered from what llama.cpp says of a file."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.added_tokens_decoder = {token: _Marked(text, control) for token, text, control in about["marked"]}
        self.chat_template = about["chat_template"]
        texts = {token: str(marked) for token, marked in self.added_tokens_decoder.items()}
        self.eos_token = texts.get(about["eos"])
        named = {"bos_token": texts.get(about["bos"]), "eos_token": self.eos_token}
        self.special_tokens_map = {name: text for name, text in named.items() if text is not None}
        self._vocabulary = {text: token for token, text in texts.items()}

    def get_chat_template(self, tools: Any = None) -> str:
        return str(self.chat_template)

    def get_added_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary
