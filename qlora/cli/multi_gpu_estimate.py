"""`qlora-estimate` of several cards: each one's need, room and share, and what all of them do together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora import shown
from qlora.cli import common
from qlora.redaction import redact_all

if TYPE_CHECKING:
    from qlora.memory.hardware import RunCard


def run(what: str, overrides: list[str], cards: tuple[RunCard, ...], fit: bool, as_json: bool) -> None:
    """Raises DoesNotFit where a card cannot hold its part."""
    from qlora import api

    question = api.multi_gpu_question(api.recipe_or_model(what, overrides), cards)
    plans = question.search() if fit else []
    whole = plans[0].whole if plans else question.decided()
    answer: dict[str, Any] = whole.as_dict()
    if fit:
        answer["plans"] = [plan.as_dict() for plan in plans]
    if as_json:
        common.answer(answer)
    else:
        with common.answering():
            _show(answer)
    if not whole.fits:
        raise question.does_not_fit()


def _show(answer: dict[str, Any]) -> None:
    from qlora.report.console import Terminal
    from qlora.report.multi_gpu import multi_gpu_view

    console = Terminal()
    answer = shown.plain_values(redact_all(answer))
    console.print(multi_gpu_view(answer))
    for number, plan in enumerate(answer.get("plans", ())):
        lines = ", ".join(plan["lines"]) or "none: it fits as it is"
        how = "layers shared by all" if plan["sharded"] else "the whole base on each"
        speed = f", {plan['tokens_per_second']:,.0f} tokens/s" if plan["tokens_per_second"] else ""
        console.print(f"{'change of the recipe' if not number else 'or'}: {lines} ({how}{speed})", soft_wrap=True)
