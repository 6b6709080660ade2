"""What tests of the look at rows share: rows in files, prepared as a run prepares them, and looked at."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from qlora.data.chat import ChatTokenizer
from qlora.data.loader import TrainOrder
from qlora.data.prepare import PreparedData, prepare
from qlora.data.xray.look import Seen, look
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import family_tokenizer

WORDS = (
    *("river", "stone", "lamp", "garden", "window", "paper", "silver", "morning"),
    *("winter", "letter", "copper", "valley", "engine", "market", "bridge"),
)


@cache
def chat(family: str = "qwen2", loss_on: str = "assistant") -> ChatTokenizer:
    return ChatTokenizer(family_tokenizer(family), loss_on, Recorder())


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sentence(number: int, words: int = 24) -> str:
    """Words in an order of their own, the same for the same number."""
    return " ".join(
        WORDS[(number * 7 + at * (number % 11 + 1) + at * at * (number % 5)) % len(WORDS)] for at in range(words)
    )


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def section(train: list[str], evaluation: list[str] | None = None, **settings: Any) -> DataSection:
    settings = {"eval_fraction": 0.0, **settings} if not evaluation else settings
    sides = {"train": train, "eval": evaluation or []}
    sources = {side: tuple(SourceSection(path=path) for path in paths) for side, paths in sides.items()}
    return DataSection(**sources, **settings)


def prepared(folder: Path, data: DataSection, using: ChatTokenizer | None = None) -> PreparedData:
    return prepare(data, "tokenizer", using or chat(), 1, folder / "cache", Recorder())


def seen(folder: Path, data: DataSection, using: ChatTokenizer | None = None, rows: int = 3) -> Seen:
    made = prepared(folder, data, using)
    packs = TrainOrder(made.train, data, 1, 1).epoch_packs(0)
    return look("base", data, using or chat(), made, packs, rows)
