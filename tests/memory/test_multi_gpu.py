"""The cards of one run: their shares, what each needs, and the one that cannot hold its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from qlora import api, ranks
from qlora.errors import DoesNotFit
from qlora.memory import multi_gpu
from qlora.memory.hardware import Machine, RunCard, asked_cards
from qlora.memory.multi_gpu import NCCL_BYTES, Estimators, plans_of_run
from qlora.ranks import Rank
from qlora.recipe.reading import Recipe
from tests.card import Card, rehearsal
from tests.memory.by_hand import AUTO, recipe
from tests.memory.cases import GIB
from tests.memory.hand_cards import HandCard
from tests.memory.shapes import config_folder

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def whole(gpus: list[str], *settings: str) -> tuple[Estimators, Recipe]:
    asked = recipe(*AUTO, "train.batch_size=16", *settings)
    return Estimators(asked_cards(gpus, []), lambda machine: cast(Any, HandCard(machine))), asked


def test_a_3090_and_a_3060_share_by_speed_and_each_by_its_memory() -> None:
    of, asked = whole(["3090", "3060 12GB"])
    found = of.whole(of.decided(asked, None), asked, 16)
    rows = [one.plan.estimate.settings["train.micro_batch_size"] for one in found.members]
    assert rows == [4, 2] and found.fits  # of 1,024 tokens, 4 MiB each where they are kept
    assert [one.packs for one in found.members] == [12, 4] and [one.share for one in found.members] == [0.75, 0.25]
    assert found.shares.rows == tuple(rows) and found.shares.speeds[0] == 1000
    alone = [one.plan.estimate.tokens_per_second for one in found.members]
    assert max(alone) < found.tokens_per_second < sum(alone)


def test_where_something_is_drawn_for_each_all_compute_the_same_micro_batches() -> None:
    of, asked = whole(["3090", "3060 12GB"], "lora.dropout=0.1")
    plans = of.decided(asked, None)
    assert [plan.estimate.settings["train.micro_batch_size"] for plan in plans] == [2, 2]
    assert plans[0].reasons["train.micro_batch_size"] == "as another card needs it"
    assert plans[0].estimate.settings["train.gradient_checkpointing"] is False  # decided anew around it


def test_cards_of_one_kind_share_a_plan_by_the_one_that_has_least_free() -> None:
    first, second = asked_cards(["2x 3090"], [])
    less = RunCard(second.name, replace(second.machine, limit_bytes=20 * GIB))
    of = Estimators([first, less], lambda machine: cast(Any, HandCard(machine)))
    assert of.kinds == [(0, 1)] and of.each[0].machine.limit_bytes == 20 * GIB - 2 * NCCL_BYTES
    asked = recipe(*AUTO)
    members = of.whole(of.decided(asked, None), asked, 16).members
    assert [one.packs for one in members] == [8, 8]
    assert [one.plan.estimate.limit_bytes for one in members] == [first.machine.limit_bytes, 20 * GIB]


def test_a_card_that_cannot_hold_its_part_is_named_with_what_to_do() -> None:
    of, asked = whole(["3090", "RTX 2050 laptop"], "data.max_length=3000", "train.micro_batch_size=1")
    with pytest.raises(DoesNotFit) as caught:
        of.refuse(of.decided(asked, None), None)
    assert caught.value.exit_code == 3
    assert caught.value.what.startswith("process 1 of 2, RTX 2050 Laptop, 4 GB, cannot hold its part: needs 4.93 GiB")
    assert "data.max_length = " in caught.value.hint and "leave that card out" in caught.value.hint
    alike, _ = whole(["2x RTX 2050 laptop"])
    with pytest.raises(DoesNotFit) as caught:
        alike.refuse(alike.decided(asked, None), None)
    assert "process" not in caught.value.what  # all of them: nothing to leave out


def told(*names: str) -> tuple[Rank, ...]:
    sizes = {"total_bytes": 25_000_000_000, "free_bytes": 24_000_000_000, "capability": 86}
    return tuple(Rank(name=name, on_card=True, host_bytes=GIB, **sizes) for name in names)


def test_a_run_plans_each_of_its_cards() -> None:
    """What NCCL takes is gone already from what they have free, and is shown as in a question."""
    own = Machine("cuda", 23 * GIB, "free on it", asked_cards(["3090"], [])[0].machine.gpu)
    estimator: Any = HandCard(own)
    estimator.text, asked = None, recipe("train.micro_batch_size=1", "train.gradient_checkpointing=true")
    assert plans_of_run(estimator, asked, None) is None
    with ranks.told(told("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3090")):
        cards = multi_gpu.cards_of(ranks.of_run(), own, "auto")
        assert [card.machine.limit_bytes for card in cards] == [23 * GIB, 24_000_000_000]
        assert multi_gpu.cards_of(ranks.of_run(), own, "5GiB")[1].machine.limit_bytes == 5 * GIB
    of = Estimators(cards, lambda machine: cast(Any, HandCard(machine)), exchanging=False)
    assert of.each[0].machine.limit_bytes in (23 * GIB, 24_000_000_000)
    first, _ = of.whole(of.decided(asked, None), asked, 2).members
    assert first.plan.estimate.limit_bytes == 23 * GIB + NCCL_BYTES
    assert first.plan.estimate.components["exchange"] == NCCL_BYTES
    assert not first.plan.estimate.error_bytes


def test_processes_without_cards_are_alike_unless_they_say_otherwise() -> None:
    own = Machine("cpu", 8 * GIB, "RAM available")
    cpu = Rank(name="cpu", on_card=False, total_bytes=0, free_bytes=4 * GIB)
    assert [one.machine for one in multi_gpu.cards_of((cpu, cpu), own, "auto")] == [own, own]
    small = cpu.model_copy(update={"name": "small cpu", "free_bytes": GIB})
    assert multi_gpu.cards_of((cpu, small), own, "auto")[1].machine == Machine("cpu", GIB, "small cpu")
    assert multi_gpu.this_rank().name == "cpu" and multi_gpu.this_rank().free_bytes > 0


def test_what_is_exchanged_goes_twice_around_over_the_slowest_link() -> None:
    machines = [card.machine for card in asked_cards(["2x 3090"], [])]
    assert multi_gpu.exchange_seconds(1 << 30, machines) == pytest.approx((1 << 30) / 12.6e9, rel=0.01)  # 8 lanes each
    assert multi_gpu.exchange_seconds(1 << 30, machines * 2) == pytest.approx(1.5 * (1 << 30) / 12.6e9, rel=0.01)
    assert multi_gpu.exchange_seconds(1 << 30, machines[:1]) == 0.0


def test_two_equal_cards_need_what_one_does_and_the_exchange(tmp_path: Path) -> None:
    """By the simulation: part by part the same but for the named one, whose margin is added too."""
    asked = api.recipe_or_model(str(config_folder(BASE, tmp_path)), ["train.gradient_checkpointing=true"])
    one = api.question(asked, gpu="3090").estimate()
    first, second = api.multi_gpu_question(asked, asked_cards(["2x 3090"], [])).decided().members
    assert first.plan.estimate == second.plan.estimate and (first.packs, second.packs) == (8, 8)
    two = first.plan.estimate
    assert two.components == {**one.components, "exchange": NCCL_BYTES}
    assert two.peak_bytes == one.peak_bytes + NCCL_BYTES and two.error_bytes == one.error_bytes + NCCL_BYTES
    assert two.limit_bytes == one.limit_bytes and two.components["gradients"] > 0  # added up where they are


def test_a_process_with_a_card_says_what_it_is_and_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card(8 * GIB)):
        rank = multi_gpu.this_rank()
    assert (rank.name, rank.on_card, rank.capability) == ("NVIDIA GeForce RTX 3070", True, 86)
    assert rank.total_bytes == 8 * GIB and 7 * GIB < rank.free_bytes <= rank.total_bytes
    assert rank.host_bytes is not None and rank.host_bytes > 0
