"""A base on meta: which tensor of the checkpoint fills each parameter, and what cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.events import Notice, Recorder
from qlora.model import meta_model
from qlora.model.base_folder import BaseFolder
from qlora.model.load import load_base
from qlora.model.meta_model import build, text_config
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
    with pytest.raises(ModelError, match="hidden_size is 'wide', which is no whole number"):
        load(at(folder))


SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        # A mask of every pair of positions, in each layer, that really exists.
        ({"model_type": "gpt_neo", **SHAPE, "max_position_embeddings": 1 << 17}, "bytes of tables"),
        ({"model_type": "gptj", "n_positions": 1 << 24}, "bytes of tables"),
        ({"model_type": "llama", "hidden_size": 1 << 19, "intermediate_size": 1 << 20}, "[0-9,]+ weights"),
        ({"model_type": "gpt_neo", **SHAPE, "num_heads": 0}, "num_heads is 0, a model has at least 1"),
        ({"model_type": "qwen3", "head_dim": 5}, ".*head_dim.*5"),
        ({"model_type": "llama", "text_config": {}}, "text_config is there, but a llama has no text part"),
    ],
)
def test_what_sizes_make_is_bounded_before_it_is_made(config: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=f"base: config.json: .*{what}"):
        text_config(config, "base")


def test_long_promises_and_several_kinds_of_layers_pass() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    text, _ = text_config({"model_type": "gemma3_text", "num_hidden_layers": 3, "layer_types": kinds}, "base")
    assert text.layer_types == kinds
    promised, _ = text_config({"model_type": "llama", "max_position_embeddings": 10_485_760}, "base")
    assert promised.max_position_embeddings == 10_485_760


def test_a_model_whose_first_layers_are_none_is_looked_at_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hybrids are whose trunk asks each kind of layer for something."""
    seen = []

    def extent(text: Any) -> tuple[int, int]:
        seen.append(text.num_hidden_layers)
        if text.num_hidden_layers < 5:
            raise KeyError("full_attention")
        return 10**14, 0

    monkeypatch.setattr(meta_model, "_extent", extent)
    with pytest.raises(ModelError, match="100,000,000,000,000 weights"):
        text_config({"model_type": "llama", "num_hidden_layers": 5}, "base")
    assert seen == [1, 5]


@pytest.mark.parametrize(
    ("outside", "inside", "head_stored", "tied"),
    [
        ({}, {}, None, False),  # the larger model's class ties by default, and its published weights do not
        ({}, {}, False, True),
        ({}, {}, True, False),
        ({"tie_word_embeddings": True}, {}, None, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, None, True),
    ],
)
def test_a_head_of_a_larger_model_is_tied_where_its_file_says_so(
    outside: dict[str, object], inside: dict[str, object], head_stored: bool | None, tied: bool
) -> None:
    text, part = text_config(_larger(outside, inside), "base", head_stored)
    assert part and text.tie_word_embeddings is tied


def test_sizes_beside_the_text_part_are_its_own_where_it_has_none() -> None:
    text, _ = text_config(_larger({"vocab_size": 4096, "head_dim": 32}, {}), "base")
    assert (text.vocab_size, text.head_dim) == (4096, 32)
    text, _ = text_config(_larger({"vocab_size": 4096}, {"vocab_size": 512}), "base")
    assert text.vocab_size == 512


def _larger(outside: dict[str, object], inside: dict[str, object]) -> dict[str, object]:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "mistral", "num_key_value_heads": 2, **small, **inside}
    return {"model_type": "mistral3", "text_config": text, "vision_config": vision, **outside}
