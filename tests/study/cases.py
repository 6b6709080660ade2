"""Passages, a tiny base as a teacher, and teachers that follow a script, for the tests of a study."""

from __future__ import annotations

from typing import Any

import torch

from qlora.data.chat import ChatTokenizer
from qlora.data.documents.chunks import Passage
from qlora.events import Recorder
from qlora.stop import StopRequest
from qlora.study.teacher import Teacher
from tests.families import make_config, make_model, make_tokenizer

CPU = torch.device("cpu")


def passage(name: str = "Orla", number: int = 7, document: str = "manual.md", language: str = "en") -> Passage:
    sentences = (
        f"The {name} pump carries a warranty of {number} years.",
        f"The filter of the {name} pump is changed every {number + 3} weeks.",
        f"Code E{number} of the {name} pump means that water is missing.",
    )
    text = f"Pumps › {name}\n\n" + " ".join(sentences)
    return Passage(document, ("Pumps", name), sentences, text, "manuals of pumps", language)


def passages(count: int = 4) -> list[Passage]:
    names = ("Orla", "Bexley", "Quillon", "Tavery", "Zephra", "Marlow")
    return [passage(names[at], 7 + 5 * at) for at in range(count)]


def chat_of(sink: Recorder | None = None) -> ChatTokenizer:
    return ChatTokenizer(make_tokenizer(), "assistant", sink or Recorder())


def tiny_teacher(model: Any = None, sink: Recorder | None = None, stop: StopRequest | None = None) -> Teacher:
    sink = sink or Recorder()
    model = model or make_model(make_config("llama", overrides={"max_position_embeddings": 2048}))
    return Teacher(model, chat_of(sink), CPU, sink, stop or StopRequest())
