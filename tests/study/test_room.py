"""What a study takes in memory and on the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from qlora.study.room import batches, foreseen, kv_bytes, room

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


def test_thoughts_need_room_before_an_answer() -> None:
    free = kv_bytes(QWEN3_4B, (400 + 96 + 96 + 512) * 5)
    assert room(QWEN3_4B, 400, 3400, free, thoughts=512).at_once == 5 < room(QWEN3_4B, 400, 3400, free).at_once
    assert room(QWEN3_4B, 400, 3400, free, 512).disk_bytes == room(QWEN3_4B, 400, 3400, free).disk_bytes
    (_, study), (_, exam) = batches(400, 100, thoughts=512)
    assert [batch[3] for batch in (*study, *exam)] == [512 + 96, 96, 512 + 64]


def test_what_is_asked_at_once() -> None:
    (_, study), (_, exam) = batches(400, 100, at_once=24)
    assert study == ((24, 500, 64, 96, 0), (24, 0, 164, 96, 97))
    assert exam == ((16, 0, 1364, 64, 0),)  # three passages, others for each row


def test_documents_decide_what_the_recipe_does_not_set(tmp_path: Path) -> None:
    """By their size where they are there; where they are not, as few pages would, which is said."""
    (tmp_path / "doc.md").write_text("# Plum\n\nThe Plum weighs 300 kilograms.\n")
    lines = '[model]\nbase = "owner/name"\n[[data.documents]]\npath = "{}"\n'
    for name, heard in (("doc.md", False), ("gone", True)):
        (tmp_path / "recipe.toml").write_text(lines.format(name))
        sink = Recorder()
        found, asks, known = foreseen(load_recipe(tmp_path / "recipe.toml"), sink)
        assert (known is None) is heard and (known is None or (known.passages, known.sentences) == (1, 1))
        assert found.lora.r == 32 and [phase for phase, _ in asks] == ["study", "exam"]
        said = [event.as_dict().get("message", "") for event in sink.events]
        assert any("not read for this estimate" in one for one in said) is heard
    plain = load_recipe(Path(__file__).parent.parent.parent / "recipes/quickstart.toml")
    assert foreseen(plain, Recorder()) == (plain, (), None)
