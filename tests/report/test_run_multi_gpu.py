"""The cards of a run on its page."""

from __future__ import annotations

from typing import Any

from qlora.foreign_json import checked
from qlora.report.run_events import Planned
from qlora.report.run_multi_gpu import section

COUNTS = ("train_rows", "eval_rows", "packs", "tokens_per_epoch", "trained_tokens_per_epoch", "batch_size", "steps")
MORE = ("micro_batch_size", "trainable_parameters", "total_parameters", "max_length")


def planned(cards: list[dict[str, Any]]) -> Planned:
    values: dict[str, Any] = {**dict.fromkeys((*COUNTS, *MORE), 1), "epochs": 1.0, "packing": True, "cards": cards}
    return checked(Planned, values, "events.jsonl")


def test_a_run_of_several_shows_them_and_one_of_one_does_not() -> None:
    one = {"card": "RTX 3060", "share": 0.25, "packs_of_step": 4, "needed_bytes": 9 << 30, "limit_bytes": 12 << 30}
    heading, table = section(planned([{**one, "card": "RTX 3090", "share": 0.75}, one]))
    text = [str(part) for part in (heading, table)]
    assert len(text) == 2
    assert list(section(planned([]))) == [] and list(section(None)) == []
