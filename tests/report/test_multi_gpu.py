"""The cards of one run as they are drawn."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from qlora import events
from qlora.report.console import plan_table
from qlora.report.multi_gpu import card_lines, multi_gpu_view

GIB = 1 << 30


def card(name: str, share: float, needed: float, limit: float) -> dict[str, Any]:
    settings = {"train.micro_batch_size": 4, "train.gradient_checkpointing": 3}
    known: dict[str, Any] = {"card": name, "share": share, "packs_of_step": round(16 * share), "settings": settings}
    sizes = {"needed_bytes": int(needed * GIB), "limit_bytes": int(limit * GIB), "fits": needed <= limit}
    return {**known, **sizes, "components": {"weights": GIB}, "tokens_per_second_alone": 1200.0}


def drawn(whole: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=130).print(multi_gpu_view(whole))
    return out.getvalue()


PLAN_OF_ALL: dict[str, Any] = {
    "batch_size": 16,
    "sharded": False,
    "tokens_per_second": 2000.0,
    "exchange_seconds": 0.0133,
    "gradient_bytes_exchanged": GIB,
    "cards": [card("big", 0.75, 10, 24), card("small", 0.25, 9, 12)],
    "reasons": [[1, "memory.embedding", "it saves room"]],
    "notes": ["a note"],
}


def test_each_card_has_its_share_its_need_and_what_is_left() -> None:
    text = drawn(PLAN_OF_ALL)
    assert "2 cards, 16 packs a step; each keeps the whole base" in text and "it fits" in text
    assert "75%" in text and "14.00 GiB" in text and "2,000 tokens/s predicted of all together" in text
    assert "13.3 ms" in text and "card 1: memory.embedding: it saves room" in text and "a note" in text


def test_the_one_that_cannot_is_named_with_what_is_missing() -> None:
    text = drawn({**PLAN_OF_ALL, "sharded": True, "cards": [card("big", 0.75, 10, 24), card("small", 0.25, 13.5, 12)]})
    assert "small cannot hold its part" in text and "-1.50 GiB" in text and "a part of every layer" in text


def test_a_run_s_plan_has_them_on_the_screen() -> None:
    out = io.StringIO()
    plan = events.Plan(1, 2, 3, 4, 5, 6, 7, 8, 9, 1.5, 10, 11, True, False, 12, "x", cards=tuple(PLAN_OF_ALL["cards"]))
    Console(file=out, width=160).print(plan_table(plan))
    assert "1: small: 25% of a step, 4 packs" in out.getvalue()


def test_a_plan_says_it_in_a_line_a_card() -> None:
    first, second = card_lines(PLAN_OF_ALL["cards"]).splitlines()
    assert first.startswith("0: big: 75% of a step, 12 packs in micro-batches of 4, the first 3 layers recomputed")
    assert second.endswith("needs 9.00 GiB of 12.00 GiB")
