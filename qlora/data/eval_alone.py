"""Rows to evaluate on beside documents: the documents' own rows are all trained, and made when the base is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import NO_ROWS, PreparedData, prepare
from qlora.events import Sink
from qlora.recipe.sections import DataSection


def prepared(
    data: DataSection, files_fingerprint: str, chat: ChatTokenizer, cache_dir: Path, sink: Sink
) -> PreparedData:
    """The rows of [[data.eval]] where there is no [[data.train]]; no rows without both. Raises DataError."""
    if not data.eval:
        return NO_ROWS
    rows = data.model_copy(update={"train": data.eval, "eval": (), "eval_fraction": 0.0})
    made = prepare(rows, files_fingerprint, chat, 0, cache_dir, sink)
    return replace(made, train=NO_ROWS.train, eval=made.train, reports=())
