"""What a study takes in memory and on the disk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qlora.study.room import kv_bytes, room

QWEN3_4B = SimpleNamespace(
    num_hidden_layers=36, num_key_value_heads=8, num_attention_heads=32, head_dim=128, hidden_size=2560
)


def test_keys_and_values_of_a_token() -> None:
    assert kv_bytes(QWEN3_4B, 1) == 147_456  # 36 layers x 2 x 8 heads x 128 x 2 bytes
    plain = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
    assert kv_bytes(plain, 10) == 2 * 2 * 2 * 64 * 10


@pytest.mark.parametrize(("free", "at_once"), [(None, 24), (8 << 30, 24), (1 << 30, 12), (0, 1), (-5, 1)])
def test_as_many_at_once_as_fit(free: int | None, at_once: int) -> None:
    assert room(QWEN3_4B, 400, 3400, free).at_once == at_once


def test_labels_of_a_hundred_pages() -> None:
    found = room(QWEN3_4B, 400, 3400, None)
    assert found.disk_bytes == 3400 * 96 * 388
    assert "24 answers at once" in found.told()
