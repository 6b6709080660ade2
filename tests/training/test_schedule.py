"""Arithmetic of a run."""

from __future__ import annotations

import pytest

from qlora.recipe.sections import CheckpointSection, TrainSection
from qlora.training.schedule import auto_batch_size, checkpoint_is_due, learning_rate, progress_of


@pytest.mark.parametrize(
    ("packs", "settings", "expected"),
    [
        (8, {}, 1),  # 24 packs in three epochs never leave 100 steps
        (400, {}, 12),  # 1,200 packs / 100 steps
        (100_000, {}, 16),
        (400, {"epochs": 1}, 4),
        (400, {"micro_batch_size": 8}, 8),  # 12 is no multiple of 8
        (8, {"micro_batch_size": 4}, 4),
        (400, {"batch_size": 7}, 7),
        (400, {"max_steps": 20}, 16),
        (10, {"max_steps": 20}, 1),
    ],
)
def test_auto_batch_size(packs: int, settings: dict[str, int], expected: int) -> None:
    assert auto_batch_size(packs, TrainSection.model_validate(settings)) == expected


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_learning_rate_rises_then_follows_its_course(name: str) -> None:
    train = TrainSection.model_validate({"lr_scheduler": name, "warmup_ratio": 0.1, "learning_rate": 1.0})
    rates = [learning_rate(progress_of(step, 99, 0.0, train), train) for step in range(99)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[9] == pytest.approx(1.0)
    after = rates[9:]
    assert after == sorted(after, reverse=True)
    assert rates[-1] == pytest.approx(1.0) if name == "constant" else rates[-1] < 0.02
    if name != "constant":
        assert rates[54] == pytest.approx(0.5, abs=1e-6)  # half way between the warm-up's end and 1


def test_no_warm_up_starts_at_the_top() -> None:
    train = TrainSection.model_validate({"warmup_ratio": 0.0, "learning_rate": 1.0, "lr_scheduler": "constant"})
    assert learning_rate(progress_of(0, 5, 0.0, train), train) == 1.0


def test_a_time_limit_brings_the_rate_down_with_the_clock() -> None:
    train = TrainSection.model_validate({"max_minutes": 10})
    assert progress_of(0, 1000, 300.0, train) == 0.5
    assert progress_of(0, 1000, 700.0, train) == 1.0
    assert progress_of(899, 1000, 10.0, train) == pytest.approx(900 / 1001)


def test_a_checkpoint_is_due_by_steps_or_by_minutes() -> None:
    section = CheckpointSection(every_steps=50, every_minutes=10)
    assert checkpoint_is_due(100, 0.1, section) and checkpoint_is_due(101, 10.0, section)
    assert not checkpoint_is_due(101, 9.9, section)
