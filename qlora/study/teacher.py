"""The base as the teacher of a study: the run's own model with the output of its adapters off.

Work is done in batches that become smaller where memory runs out; each is left for a stop that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from qlora.data.chat import ChatTokenizer
from qlora.device import release_memory
from qlora.errors import DoesNotFit
from qlora.events import Notice, Recovered, Sink
from qlora.guarded import Attempt
from qlora.stop import StopRequest
from qlora.study.generation import MAX_THOUGHTS, Manner, Written, score, write
from qlora.study.prompts import Frame, prompt_ids
from qlora.study.thinking import Thoughts

T = TypeVar("T")
AT_ONCE = 24  # prompts of one batch: a passage's questions, by default


@dataclass
class Teacher:
    """A loaded base with adapters, and how it is asked. `at_once` becomes smaller where memory runs out."""

    model: Any  # peft's wrapper around the causal LM, or a causal LM alone
    chat: ChatTokenizer
    device: torch.device
    sink: Sink
    stop: StopRequest
    at_once: int = AT_ONCE
    thoughtful: list[bool] = field(default_factory=list)  # of texts that began with thoughts: whether words followed

    def ids(self, frame: Frame, text: str) -> list[int]:
        """Tokens of a prompt of `prompts.Prompts`. Raises RowError where a template cannot render it."""
        return prompt_ids(self.chat, frame, text)

    def sample(
        self, frame: Frame, texts: Sequence[str], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """What the base writes after each text, drawn at a temperature with a seed for each."""
        manner = replace(self._manner(frame, max_new_tokens), temperature=temperature)
        prompts = [self.ids(frame, text) for text in texts]

        def batch(first: int, until: int) -> list[Written]:
            return self._heard(write(self.model, prompts[first:until], manner, seeds[first:until], self.stop.check))

        with self.adapters_off():
            return [self.text(written) for written in self._in_batches(len(prompts), batch)]

    def greedy(self, frame: Frame, texts: Sequence[str], max_new_tokens: int) -> list[Written]:
        """The base's most likely continuation of each text, with its probabilities."""
        with self.adapters_off():
            return self._greedy(frame, texts, max_new_tokens)

    def tuned(self, frame: Frame, texts: Sequence[str], max_new_tokens: int) -> list[Written]:
        """As `greedy`, by the model with its adapters."""
        return self._greedy(frame, texts, max_new_tokens)

    def score(self, frame: Frame, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """The base's log-probabilities in nats of each answer's tokens behind its text."""
        prompts = [self.ids(frame, text) for text in texts]

        def batch(first: int, until: int) -> list[tuple[float, ...]]:
            return score(self.model, prompts[first:until], answers[first:until], self.chat.pad_id, self.stop.check)

        with self.adapters_off():
            return self._in_batches(len(prompts), batch)

    def text(self, written: Written) -> str:
        return str(self.chat.tokenizer.decode(list(written.token_ids), skip_special_tokens=True)).strip()

    def _greedy(self, frame: Frame, texts: Sequence[str], max_new_tokens: int) -> list[Written]:
        manner = self._manner(frame, max_new_tokens)
        prompts = [self.ids(frame, text) for text in texts]

        def batch(first: int, until: int) -> list[Written]:
            return self._heard(write(self.model, prompts[first:until], manner, (), self.stop.check))

        return self._in_batches(len(prompts), batch)

    def _manner(self, frame: Frame, max_new_tokens: int) -> Manner:
        ends = frozenset(self.chat.end_token_ids) | (self._line_ends if frame == "lines" else frozenset())
        return Manner(max_new_tokens, ends, self.chat.pad_id, spoken_from=self._thoughts.spoken_from)

    @cached_property
    def _thoughts(self) -> Thoughts:
        return Thoughts.of(self.chat)

    def _heard(self, found: list[Written]) -> list[Written]:
        """Counts the texts that thoughts were cut from."""
        self.thoughtful += [bool(one.token_ids) for one in found if one.thoughts]
        return found

    def tell_thoughts(self) -> None:
        """A notice of the thoughts that were cut since the last one."""
        if self.thoughtful:
            message = "questions and answers began with thoughts, which were cut from them"
            if lost := self.thoughtful.count(False):
                message += f"; of {lost:,} nothing was left, thoughts of more than {MAX_THOUGHTS} tokens among them"
            self.sink.emit(Notice("study", message, len(self.thoughtful)))
        self.thoughtful.clear()

    @cached_property
    def _line_ends(self) -> frozenset[int]:
        """Tokens that hold the end of a line: what the frame `lines` ends with."""
        tokenizer = self.chat.tokenizer
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return frozenset(token for token, piece in enumerate(pieces) if "\n" in piece)

    def adapters_off(self) -> AbstractContextManager[None]:
        """While it is open, the model is its base: what the adapters would add is not computed."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    def _in_batches(self, count: int, work: Callable[[int, int], list[T]]) -> list[T]:
        """`work` on each stretch of what there is to do, in batches that become smaller until they fit."""
        done: list[T] = []
        while len(done) < count:
            self.stop.check()
            with Attempt() as memory:
                done += work(len(done), min(count, len(done) + self.at_once))
            if not memory.reason:
                continue
            release_memory(self.device)
            if self.at_once == 1:
                what = f"out of memory while one question was asked: {memory.reason}"
                raise DoesNotFit(what, "lower study.passage_tokens, or use a smaller base")
            self.at_once //= 2
            message = f"out of memory: {memory.reason}: {self.at_once} questions at once from here on"
            self.sink.emit(Recovered(0, message))
        return done
