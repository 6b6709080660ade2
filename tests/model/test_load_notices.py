"""What of a base differs from what a recipe says is said before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.events import Notice, Recorder, Sinks
from qlora.model.load import swap_all_linear
from qlora.model.load_notices import report
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tests.families import make_base


def said(folder: Path, quantization: QuantizationSection) -> list[Notice]:
    base, sink = resolve(str(folder), "main", Sinks()), Recorder()
    meta_model = build(base)
    swap_all_linear(meta_model, base, quantization)
    report(meta_model, base, quantization, sink)
    return [event for event in sink.events if isinstance(event, Notice)]


def test_a_plain_base_has_nothing_to_say(tmp_path: Path) -> None:
    assert said(make_base("llama", tmp_path / "base"), QuantizationSection()) == []


def test_keys_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "a_key_of_theirs": 7}))
    (notice,) = said(folder, QuantizationSection())
    assert "a_key_of_theirs" in notice.message and notice.count == 1


@pytest.mark.parametrize(("kind", "count"), [("nf4", 1), ("none", 0)])
def test_layers_that_stay_in_16_bit_are_said_where_others_do_not(tmp_path: Path, kind: str, count: int) -> None:
    found = said(make_base("mamba", tmp_path / "base"), QuantizationSection(type=kind))
    assert sum("layers that stay in 16 bit: " in notice.message for notice in found) == count
