"""One answer, token by token: prompt in, pieces of text out, until the model ends it or something else does.

Pieces are whole letters, and a stop string is never shown in part: text that may become one is held back until it is
known. What ends an answer is what ended one in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from qlora.ask.keeping import TorchRow
from qlora.ask.llama import LlamaModel, LlamaRow
from qlora.ask.opened import TorchModel
from qlora.ask.sampling import Drawer
from qlora.ask.settings import Sampling

Finish = Literal["stop", "length", "interrupted"]
_LETTER_TOKENS = 8  # a letter has four bytes at most, and a token at least one


class TokenDecoder:
    """Tokens of transformers to text, a letter only when all its tokens are there.

    What a token adds is seen by decoding it behind those before it: how a token is spelled may depend on them (a space
    at the beginning of a word).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from, self._until = 0, 0  # the tokens before those that are still to be shown

    def take(self, token: int) -> str:
        self._ids.append(token)
        return self._new(len(self._ids) - self._until > _LETTER_TOKENS)

    def rest(self) -> str:
        """What is left of a letter whose end never came."""
        return self._new(True)

    def _new(self, all_of_it: bool) -> str:
        before, now = self._text(self._ids[self._from : self._until]), self._text(self._ids[self._from :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not all_of_it):
            return ""
        self._from, self._until = self._until, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Text up to the first of some strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._kept = ""
        self.found = False

    def take(self, text: str) -> str:
        """What may be shown now: nothing that may yet become one of the strings."""
        whole = self._kept + text
        places = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if places:
            self.found, self._kept = True, ""
            return whole[: min(places)]
        held = max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._kept = whole[len(whole) - held :]
        return whole[: len(whole) - held]

    def rest(self) -> str:
        """What was held back, and has become none of them."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Writing:
    """An answer being written: iterate over it for its pieces, then read how it ended.

    `finish`: "stop" (the model ended it, or a stop string), "length" (max_tokens, or the context is full),
    "interrupted" (`stopped` said so). `tokens`: what was written, without what ended it. `reused`: tokens of the prompt
    that were still held.
    """

    def __init__(
        self,
        opened: TorchModel | LlamaModel,
        row: TorchRow | LlamaRow,
        prompt: Sequence[int],
        sampling: Sampling,
        number: int = 0,
        stops: Sequence[str] = (),
    ) -> None:
        self._opened, self._row, self.prompt, self._sampling = opened, row, prompt, sampling
        self._drawer = Drawer(sampling, number)
        self._stops = StopStrings(stops)
        self.stopped: Callable[[], bool] = lambda: False
        self.tokens: list[int] = []
        self.finish: Finish = "length"
        self.reused = 0

    def __iter__(self) -> Iterator[str]:
        decoder = decoder_of(self._opened)
        try:
            for token in self._tokens():
                if text := self._stops.take(decoder.take(token)):
                    yield text
                if self._stops.found:
                    self.finish = "stop"
                    return
        except Interrupted:
            self.finish = "interrupted"
        if rest := self._stops.take(decoder.rest()) + ("" if self._stops.found else self._stops.rest()):
            yield rest

    def _tokens(self) -> Iterator[int]:
        ids, ends = list(self.prompt), frozenset(self._opened.chat.end_token_ids)
        self._row.check = self._check
        room = min(self._sampling.max_tokens, self._opened.context - len(ids))
        for number in range(room):
            self._check()
            logits_V = self._row.logits(ids)
            if number == 0:
                self.reused = self._row.reused
            token = self._drawer.next(logits_V, ids)
            if token in ends:
                self.finish = "stop"
                return
            self.tokens.append(token)
            ids.append(token)
            yield token

    def _check(self) -> None:
        if self.stopped():
            raise Interrupted


class Interrupted(Exception):
    """An answer is to be written no further."""


def decoder_of(opened: TorchModel | LlamaModel) -> Any:
    """For one answer: `take(token)` and `rest()` give text."""
    return opened.chat.decoder() if isinstance(opened, LlamaModel) else TokenDecoder(opened.chat.tokenizer)
