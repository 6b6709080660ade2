"""Losses that jump, and adapters that never moved."""

from __future__ import annotations

import torch

from qlora.training import health
from qlora.training.health import Trend
from tests.data.cases import split_of


def course(losses: list[float]) -> list[int]:
    """Places of the spikes in a course of losses."""
    trend, found = Trend(), []
    for place, loss in enumerate(losses):
        if trend.is_spike(loss):
            found.append(place)
        trend = trend.after(loss)
    return found


def test_a_jump_is_a_spike_and_noise_is_none() -> None:
    quiet = [2.0 * 0.98**step + 0.05 * ((step * 7919) % 13 - 6) / 6 for step in range(100)]
    assert course(quiet) == []
    assert course([*quiet[:60], 9.0, *quiet[60:]]) == [60]
    assert course([1.0] * 50 + [1.2]) == []  # 20 % above a flat course is no jump
    assert course([5.0, 1.0, 9.0]) == []  # before there is a course, nothing leaves it
    assert course([1.0] * 30 + [10.0] * 30)[:1] == [30] and len(course([1.0] * 30 + [10.0] * 60)) < 20


def test_a_fingerprint_changes_with_any_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(3, 5, dtype=dtype)
        before = health.fingerprints({"a": tensor})
        bits = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
        for place in range(15):
            bits.view(-1)[place] ^= 1
            assert health.fingerprints({"a": tensor}) != before
            bits.view(-1)[place] ^= 1
        # Adam's first step moves every weight of a zero matrix by the same amount, up or down.
        tensor += torch.tensor([1e-4, -1e-4, 1e-4, -1e-4, 1e-4])
        assert health.fingerprints({"a": tensor}) != before


def test_names_of_modules() -> None:
    for name, module in (
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "model.layers.0.mlp.up_proj"),
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            "model.layers.0.mlp.up_proj",
        ),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head"),
    ):
        assert health.module_of(name) == module


def test_the_rows_of_bad_micro_batches_are_named_and_counted() -> None:
    split = split_of([2] * 60)
    micro_batches = [[(0, 1)], [(2,), (3,)]]
    assert health.rows_behind([1.0, float("nan")], micro_batches, split) == "a.jsonl:3, a.jsonl:4"
    # Every loss is finite: a gradient is not, and it may be any row's.
    assert health.rows_behind([1.0, 2.0], micro_batches, split) == "a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4"
    many = health.rows_behind([float("inf")], [[tuple(range(60))]], split)
    assert many.count("a.jsonl:") == health.NAMED_ROWS and many.endswith("a.jsonl:20 and 40 more")
