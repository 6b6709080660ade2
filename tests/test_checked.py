"""What a check found, as lines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qlora.checked import Checked


def test_rows_and_tokens_are_a_line_each() -> None:
    data: Any = SimpleNamespace(
        train=SimpleNamespace(lengths=[1500, 2], trained=[700, 1]), eval=SimpleNamespace(lengths=[], trained=[])
    )
    memory: Any = SimpleNamespace(peak_bytes=3 << 29, limit_bytes=1 << 33)
    lines = Checked(data, memory).lines()
    assert lines[0] == "2 rows to train on: 1,502 tokens, 701 trained"
    assert lines[2:] == [
        "memory: 1.50 GiB at its peak, the limit is 8.00 GiB",
        "recipe, base, tokenizer and rows are good",
    ]
    assert len(Checked(data, None).lines()) == 3
