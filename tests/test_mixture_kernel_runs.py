"""Runs whose experts are multiplied by the kernel, its twin in its place: recorded, gone on with, and where there is
none gone on with in chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.events import Recorder
from qlora.step.experts import IN_CHUNKS, IN_TRITON
from qlora.step.kernels import experts as kernels
from qlora.step.kernels import trial
from qlora.training import checkpoint
from tests import runs
from tests.mixtures import make_base

SETTINGS = ("train.max_steps=4", "train.learning_rate=2e-3", "train.batch_size=4", "train.warmup_ratio=0")
SETTINGS += ("eval.samples=0", "data.eval_fraction=0", "data.max_length=96", "checkpoint.every_steps=1")
SIZES = {"moe_intermediate_size": 64}  # of which a block of 64 is a row


def form_of(recipe: Path) -> str | None:
    saved = checkpoint.newest(runs.run_dir(recipe), Recorder())
    assert saved is not None and saved.state.numerics is not None
    return saved.state.numerics.experts


@pytest.mark.slow
def test_a_run_by_the_kernel_goes_on_by_it_and_elsewhere_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("qwen3_moe", tmp_path / "base", overrides=SIZES)
    one, other, older = (runs.write_recipe(tmp_path / name, base) for name in ("straight", "stopped", "older"))
    runs.train(older, *SETTINGS, stop_after=1)
    assert form_of(older) == IN_CHUNKS
    calls, real = [], kernels.grouped

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given[-1])
        return real(*given)

    monkeypatch.setattr(kernels, "grouped", counted)
    monkeypatch.setattr(trial, "multiplies_experts", lambda device: True)
    runs.train(older, *SETTINGS, mode="resume", stop_after=2)
    assert form_of(older) == IN_CHUNKS and not calls  # as it began, though there is a kernel now
    began = runs.train(one, *SETTINGS)
    assert runs.values(began, "start", "numerics")[0]["experts"] == IN_TRITON == form_of(one)
    assert set(calls) == {False, True}
    runs.train(other, *SETTINGS, stop_after=2)
    runs.train(other, *SETTINGS, mode="resume", stop_after=3)
    assert runs.hashes(one, 3) == runs.hashes(other, 3)
    monkeypatch.setattr(trial, "multiplies_experts", lambda device: False)
    calls.clear()
    elsewhere = runs.train(other, *SETTINGS, mode="resume")
    (said,) = [message for message in runs.values(elsewhere, "notice", "message") if "not bit for bit" in message]
    assert said.endswith(f"experts {IN_TRITON} (now {IN_CHUNKS})")
    assert not calls and form_of(other) == IN_CHUNKS
