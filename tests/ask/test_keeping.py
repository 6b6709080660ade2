"""What is kept of a row changes no answer: each family, rows that grow, that are cut, that begin anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.ask import keeping
from qlora.ask.keeping import TorchRow
from tests.families import make_base

# 12 tokens are these families' sliding window: some of these rows are shorter, most longer.
ROWS = ([5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 9], [*range(20, 50)], [*range(20, 56)], [*range(20, 40), 7, 8], [9], [9])


def opened(family: str, folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(make_base(family, folder), dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_rows_that_are_kept_and_cut_give_the_same_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "TOKENS_AT_ONCE", 7)  # and a prompt comes in pieces
    model = opened(family, tmp_path)
    row, reused = TorchRow(model), []
    for ids in ROWS:
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
        assert np.abs(row.logits(ids) - whole).max() < 1e-3
        reused.append(row.reused)
    assert reused[:3] == [0, 3, 2] and reused[4] == 30 and reused[6] == 0
    # A window that has moved on cannot be cut: its family computes the row anew.
    assert reused[5] == (20 if family == "llama" else 0)


def test_a_call_that_fails_midway_leaves_nothing_behind(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    row = TorchRow(model)
    before = row.logits([5, 6, 7])
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError):  # all layers have the new token by now
            row.logits([5, 6, 7, 8])
    assert np.abs(row.logits([5, 6, 7]) - before).max() < 1e-5 and row.reused == 0


def test_a_family_that_keeps_nothing_is_given_the_whole_row(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        whole = [
            model(input_ids=torch.tensor([ids])).logits[0, -1].numpy() for ids in ([*range(9, 30)], [*range(9, 31)])
        ]
    forward = model.forward
    monkeypatch.setattr(keeping, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(keeping, "name_of_cache", lambda _: "state")
    monkeypatch.setattr(model, "forward", lambda **given: forward(**{**given, "use_cache": False}))
    row = TorchRow(model)
    for ids, expected in zip(([*range(9, 30)], [*range(9, 31)]), whole, strict=True):
        assert np.abs(row.logits(ids) - expected).max() < 1e-4 and row.reused == 0


def test_a_stop_is_seen_between_two_pieces_of_a_prompt(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "TOKENS_AT_ONCE", 4)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    row, seen = TorchRow(model), []

    def check() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    row.check = check
    with pytest.raises(KeyboardInterrupt):
        row.logits([*range(20)])
    row.check = lambda: None
    row.logits([*range(20)])
    assert row.reused == 8  # what was computed before the stop is kept
