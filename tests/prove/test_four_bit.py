"""4-bit weights: the proof holds, and one code or constant that differs is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.prove import four_bit
from tests.prove.cases import broken, holds


def test_it_holds_and_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "SHAPE", (64, 128 * 64))
    holds(four_bit.PROOF, tmp_path)
    honest = four_bit._by_bitsandbytes

    def other(weight: torch.Tensor, kind: str) -> four_bit.Quantized:
        made = honest(weight, kind)
        if kind == "nf4":
            made.data.view(-1)[7] ^= 1
        else:
            made.state.offset = made.state.offset + 1e-3
        return made

    monkeypatch.setattr(four_bit, "_by_bitsandbytes", other)
    said = broken(four_bit.PROOF, tmp_path).said
    assert "nf4: codes" in said and "fp4: offset" in said and "nf4: offset" not in said


def test_the_weight_has_what_quantizers_stumble_over() -> None:
    blocks = four_bit._weight().view(-1, four_bit.BLOCK).float()
    assert not blocks[5].any() and blocks[77].abs().max() < 1e-15 and blocks[78].abs().max() > 1e3
