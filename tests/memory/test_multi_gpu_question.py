"""Several cards that are asked about: how they are named, and plans in which each holds its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from qlora import api
from qlora.errors import DoesNotFit, HardwareError
from qlora.memory.hardware import asked_cards
from qlora.memory.multi_gpu import NCCL_BYTES, Estimators
from qlora.memory.multi_gpu_question import MultiGpuQuestion
from qlora.memory.question import Question
from tests.memory.by_hand import AUTO, recipe
from tests.memory.cases import NAMES
from tests.memory.hand_cards import HandCard
from tests.memory.shapes import config_folder


def asked(gpus: list[str], *settings: str) -> MultiGpuQuestion:
    cards = asked_cards(gpus, [])
    estimators = Estimators(cards, lambda machine: cast(Any, HandCard(machine)))
    return MultiGpuQuestion(Question(recipe(*settings), estimators.each[0]), cards, estimators)


def test_cards_are_named_one_by_one_or_counted() -> None:
    names = [card.name for card in asked_cards(["2x RTX 3090", "3060 12GB"], [])]
    assert names == ["RTX 3090, 24 GB"] * 2 + ["RTX 3060 12GB"]
    sizes = asked_cards([], ["2 × 24GB", "8GiB"])
    assert [card.name for card in sizes] == ["24GB", "24GB", "8GiB"]
    assert sizes[0].machine.source.startswith("a card sold with 24 GB")
    for wrong in ("0x 3090", "65x 3090", "2x nothing"):
        with pytest.raises(HardwareError):
            asked_cards([wrong], [])


def test_a_search_gives_each_card_what_it_holds_and_says_so_in_one_recipe() -> None:
    """What cards decide for themselves is "auto" in it; what is learned is the same on all."""
    (plan, *_) = asked(["3090", "RTX 2050 laptop"], "train.micro_batch_size=1", "data.max_length=4096").search()
    members = plan.whole.members
    assert plan.whole.fits and plan.changes["data.max_length"] == 1024
    assert len({one.plan.recipe.data.max_length for one in members}) == 1
    assert plan.changes["train.micro_batch_size"] == "auto" and "train.gradient_checkpointing" not in plan.changes
    assert 'train.micro_batch_size = "auto"' in plan.as_dict()["lines"]
    assert "train.batch_size" not in plan.changes


def test_where_one_holds_nothing_there_is_no_plan_and_it_is_named() -> None:
    none = asked(["3090", "3090"], *AUTO, "lora.r=4", "data.max_length=256")
    small = replace(none.cards[1], name="a chip", machine=replace(none.cards[1].machine, gpu=None, limit_bytes=1 << 30))
    cards = (none.cards[0], small)
    question = replace(none, cards=cards, estimators=Estimators(cards, lambda one: cast(Any, HandCard(one))))
    assert question.search() == []
    with pytest.raises(DoesNotFit, match="process 1 of 2, a chip, cannot hold its part"):
        raise question.does_not_fit()


@pytest.mark.slow
def test_70b_on_two_cards_of_24_gb_keeps_half_of_each_layer_on_each(tmp_path: Path) -> None:
    """Whole it fits neither; the answer is of layers that the cards share."""
    base = str(config_folder(NAMES[70], tmp_path))
    settings = ["memory.stream_weights=false", "train.gradient_checkpointing=true", "data.max_length=1024"]
    question = api.multi_gpu_question(api.recipe_or_model(base, settings), asked_cards([], ["2x24GB"]))
    whole = question.decided()
    first, second = (one.plan.estimate for one in whole.members)
    assert whole.sharded and whole.fits and first == second
    assert 17 * 2**30 < first.components["weights"] < 22 * 2**30  # 35.3 GB in 4 bit: half of it, and two layers
    assert whole.tokens_per_second > 0 and first.components["exchange"] == NCCL_BYTES
    whole = api.recipe_or_model(base, [*settings, "memory.shard_weights=false"])
    alone = api.multi_gpu_question(whole, asked_cards([], ["2x24GB"]))
    assert not alone.decided().fits and not alone.decided().sharded
