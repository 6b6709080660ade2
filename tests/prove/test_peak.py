"""Memory said and measured: the CPU's bound, the card's two, and that the estimate is of the steps that are run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora.prove import peak
from qlora.prove.shapes import SHAPES
from tests.prove.cases import TINY, broken, holds, place


def test_it_holds_on_a_cpu_and_is_broken_by_an_estimate_that_is_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds(peak.PROOF, tmp_path)
    monkeypatch.setattr(peak, "HOST_SLACK_BYTES", -(1 << 40))
    broken(peak.PROOF, tmp_path)


def test_a_card_is_held_to_both_of_its_figures(tmp_path: Path) -> None:
    estimate = peak.predicted(replace(place(tmp_path), shape=replace(TINY, name="tiny")))
    estimate = replace(estimate, tensor_bytes=1000, peak_bytes=3000, components={"context": 1000})
    assert peak._on_card(estimate, counted=1000, taken=2000).holds
    assert peak._on_card(estimate, counted=960, taken=2000).holds
    for counted, taken in ((1030, 2000), (940, 2000), (1000, 2050)):  # under, far over, fragments under
        assert peak._on_card(estimate, counted, taken).holds is False


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
    assert SHAPES["small"].needs_bytes > 0
