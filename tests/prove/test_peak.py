"""Memory said and measured: the CPU's bound, the card's two, and that the estimate is of the steps that are run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora.memory.estimate import Estimate
from qlora.prove import peak
from qlora.prove.proof import Outcome, Place
from tests.card import GIB, Card, rehearsal
from tests.prove.cases import broken, holds, place


def test_it_holds_on_a_cpu_and_is_broken_by_an_estimate_that_is_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds(peak.PROOF, tmp_path)
    monkeypatch.setattr(peak, "HOST_SLACK_BYTES", -(1 << 40))
    broken(peak.PROOF, tmp_path)


def test_a_card_is_held_to_both_of_its_figures(tmp_path: Path) -> None:
    estimate = peak.predicted(place(tmp_path), peak.SETTINGS[0])
    parts = {"context": 1000}
    estimate = replace(estimate, tensor_bytes=1000, peak_bytes=3000, error_bytes=100, components=parts)
    for counted, taken in ((1000, 2000), (960, 2000), (1000, 2100), (1000, 1740)):
        assert peak._on_card(estimate, counted, taken).holds, (counted, taken)
    for counted, taken in ((1030, 2000), (940, 2000), (1000, 2101), (1000, 1730)):  # each under, each far over
        assert peak._on_card(estimate, counted, taken).holds is False


def test_on_a_card_each_setting_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool, str]] = []

    def measured(where: Place, setting: peak.Setting, estimate: Estimate) -> Outcome:
        found = estimate.settings
        asked.append((found["data.max_length"], found["train.gradient_checkpointing"], found["train.optimizer"]))
        return Outcome(len(asked) != 2, "as measured", {"x": len(asked)})

    monkeypatch.setattr(peak, "_measured", measured)
    with rehearsal(monkeypatch, Card(total=4 * GIB)):
        outcome = broken(peak.PROOF, tmp_path)
    assert asked == [(64, True, "adamw_8bit"), (32, True, "adamw"), (16, False, "paged_adamw_8bit")]
    assert set(outcome.measured.values()) == {1, 2, 3}


def test_the_highest_moment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "LOOK_SECONDS", 0.001)
    with peak._highest_resident() as highest:
        before = highest[0]
        block = bytearray(64 << 20)
        for _ in range(2000):
            if highest[0] >= before + (60 << 20):
                break
            sum(block[:5000])
    assert highest[0] >= before + (60 << 20)
