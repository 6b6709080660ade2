"""Passages, a tiny base as a teacher, and a teacher that follows a script, for the tests of a study."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from qlora.data.chat import ChatTokenizer
from qlora.data.documents.chunks import Passage
from qlora.events import Recorder
from qlora.stop import StopRequest
from qlora.study.generation import TOP, Written
from qlora.study.prompts import Frame
from qlora.study.study import StudySettings
from qlora.study.teacher import Teacher
from tests.families import make_config, make_model, make_tokenizer

CPU = torch.device("cpu")
NAMES = ("Orla", "Bexley", "Quillon", "Tavery", "Zephra", "Marlow")
_ASKED = (
    ("warranty", ("How many years of warranty has the {} pump?", "For how long is the {} pump covered by warranty?")),
    ("filter", ("After how many weeks is the filter of the {} pump changed?", "When does the {} pump need a filter?")),
    ("Code", ("What does the code of the {} pump mean?", "Which trouble has the {} pump when it shows its code?")),
)


def passage(name: str = "Orla", number: int = 7, document: str = "manual.md", language: str = "en") -> Passage:
    sentences = (
        f"The {name} pump carries a warranty of {number} years.",
        f"The filter of the {name} pump is changed every {number + 3} weeks.",
        f"Code E{number} of the {name} pump means that water is missing.",
    )
    text = f"Pumps › {name}\n\n" + " ".join(sentences)
    return Passage(document, ("Pumps", name), sentences, text, "manuals of pumps", language)


def passages(count: int = 4) -> list[Passage]:
    return [passage(NAMES[at], 7 + 5 * at) for at in range(count)]


def settings(**changed: Any) -> StudySettings:
    given: dict[str, Any] = {
        "questions": 6,
        "kinds": ("fact", "backward"),
        "sure": 0.5,
        "probe": True,
        "max_minutes": None,
        "exam_questions": 4,
        "left_out": 0.1,
        "seed": 5,
        "base": "a base",
    }
    return StudySettings(**{**given, **changed})


@cache
def chat() -> ChatTokenizer:
    return ChatTokenizer(make_tokenizer(), "assistant", Recorder())


class _NoModel:
    """What a study asks of a model whose teacher follows a script."""

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(384, 1)


def tiny_teacher(model: Any = None, sink: Recorder | None = None, stop: StopRequest | None = None) -> Teacher:
    sink = sink or Recorder()
    model = model or make_model(make_config("llama", overrides={"max_position_embeddings": 2048}))
    return Teacher(model, chat(), CPU, sink, stop or StopRequest())


class Killed(BaseException):
    """The process ends here."""


class Scripted(Teacher):
    """A teacher that asks about a sentence and reads the answer from what is in view, as a good base would.

    `calls` counts by kind what it was asked to do; with `kill_at` it ends the process in that call. `asks`: whether it
    writes questions at all. `reads`: whether it answers from the text.
    """

    def __init__(self, kill_at: int | None = None, asks: bool = True, reads: bool = True) -> None:
        super().__init__(_NoModel(), chat(), CPU, Recorder(), StopRequest())
        self.kill_at, self.asks, self.reads = kill_at, asks, reads
        self.calls = 0
        self.sampled: list[str] = []
        self.answered: list[str] = []

    @property
    def recorder(self) -> Recorder:
        assert isinstance(self.sink, Recorder)
        return self.sink

    def sample(
        self, frame: Frame, texts: Sequence[str], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        self._called()
        self.sampled += texts
        return [self._question(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    def greedy(self, frame: Frame, texts: Sequence[str], max_new_tokens: int) -> list[Written]:
        self._called()
        self.answered += texts
        return [self._written(self._read(text)) for text in texts]

    def score(self, frame: Frame, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        self._called()
        return [(-3.0,) * len(answer) for answer in answers]

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        self.stop.check()

    def _question(self, text: str, seed: int) -> str:
        sentence = re.findall(r"(?:Sentence|A line of it): (.*)", text)[-1]
        name = re.search(r"the (\w+) pump|The (\w+) pump", sentence)
        if not self.asks or name is None:
            return "The pump and the pump and the pump"
        wordings = next(wordings for sign, wordings in _ASKED if sign in sentence)
        return "Q: " + wordings[seed % 2].format(name[1] or name[2])

    def _read(self, text: str) -> str:
        view, _, asked = text.rpartition("Q: ")
        name = re.search(r"the (\w+) pump", asked)
        if not self.reads or not view or name is None:
            return "no idea"
        if "warranty" in asked:
            found = re.search(rf"The {name[1]} pump carries a warranty of (\d+ years)", view)
        elif "filter" in asked:
            found = re.search(rf"filter of the {name[1]} pump is changed every (\d+ weeks)", view)
        else:
            found = re.search(rf"of the {name[1]} pump means that (water is missing)", view)
        return found[1] if found else "no idea"

    def _written(self, text: str) -> Written:
        tokens = self.chat.tokenizer.encode(text, add_special_tokens=False)
        ids = np.full((len(tokens) + 1, TOP), -1, dtype=np.int32)
        ids[:, 0] = [*tokens, self.chat.end_token_ids[0]]
        logprobs = np.full((len(tokens) + 1, TOP), -np.inf, dtype=np.float16)
        logprobs[:, 0] = -0.125
        return Written(tuple(tokens), True, (-0.125,) * len(tokens), ids, logprobs)
