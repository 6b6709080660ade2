"""A base on meta: which tensor of the checkpoint fills each parameter, and what cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model.base_folder import BaseFolder
from qlora.model.load import load_base
from qlora.model.meta_model import build
from qlora.recipe.sections import QuantizationSection
from tests.families import FAMILIES, make_base
from tests.model.conftest import CPU, at, change_config, load


def test_sources_name_every_tensor(base_of: Callable[[str], BaseFolder]) -> None:
    for family in FAMILIES:
        base = base_of(family)
        assert set(build(base).sources.values()) == set(base.tensors)
        assert all(name == source for name, source in build(base).sources.items())


@pytest.mark.parametrize(
    ("family", "overrides", "what"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "Conv1D"),
        ("mixtral", {"num_local_experts": 4}, "fused experts .*GiB"),
    ],
)
def test_what_4_bit_cannot_hold_is_refused(tmp_path: Path, family: str, overrides: dict[str, Any], what: str) -> None:
    make_base(family, tmp_path / "base", overrides=overrides)
    with pytest.raises(ModelError, match=what):
        load(at(tmp_path / "base"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path / "base")
    change_config(folder, intermediate_size=96)
    with pytest.raises(ModelError, match=r"mlp.down_proj.weight is \[64, 128\], but"):
        load(at(folder))
    change_config(folder, intermediate_size=128, num_hidden_layers=3)
    with pytest.raises(ModelError, match="9 of its tensors are missing, the first is model"):
        load(at(folder))
    change_config(folder, num_hidden_layers=1)
    sink = Recorder()
    load_base(at(folder), QuantizationSection(), "auto", CPU, sink)
    assert any(isinstance(event, Notice) and event.message.startswith("9 tensors") for event in sink.events)
    change_config(folder, hidden_size="wide")
    with pytest.raises(ModelError, match="cannot build this model"):
        load(at(folder))
