"""What config.json says of MXFP4: the same as to transformers, and what is refused by it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model import mxfp4_config
from qlora.model.resolve import resolve_config
from tests.mixtures import make_config
from tests.mxfp4 import STATED

NAMES = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1, 10, 11)]
PATTERNS = [
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    ["model.layers.1"],
    ["model.layers.1."],
    ["model.layers.*.mlp"],
    ["model.layers.[01].mlp.experts"],
    ["model.layers.1.mlp.exp"],
    ["layers.1.mlp.experts"],
    ["experts"],
    ["xperts"],
    ["model"],
    ["(a|model).layers.(1|10)"],
    ["down_proj", ""],
    [],
    None,
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_mean_what_they_mean_to_transformers(patterns: list[str] | None) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = {"quantization_config": {**STATED, "modules_to_not_convert": patterns}}
    for name in NAMES:
        assert mxfp4_config.holds(config, name) == should_convert_module(name, patterns), (name, patterns)


def test_an_object_of_transformers_says_the_same() -> None:
    config = make_config("gpt_oss")
    assert not mxfp4_config.is_stated(config) and not mxfp4_config.holds(config, NAMES[0])
    config.quantization_config = STATED
    assert mxfp4_config.is_stated(config) and mxfp4_config.holds(config, NAMES[0])


def said(folder: Path, **changed: Any) -> str:
    config = {**make_config("gpt_oss").to_dict(), "quantization_config": STATED, **changed}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refusal:
        resolve_config(str(folder), "main", Recorder())
    assert refusal.value.hint and "\n" not in refusal.value.what + refusal.value.hint
    return refusal.value.what


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_type": "qwen3_moe"}, "already quantized (mxfp4)"),
        ({"intermediate_size": 48}, "intermediate_size is 48, but values of MXFP4 share a scale by 32"),
        ({"hidden_size": 72}, "hidden_size is 72, but"),
        ({"quantization_config": {**STATED, "modules_to_not_convert": "experts"}}, "is no list of names"),
        ({"quantization_config": {**STATED, "modules_to_not_convert": ["x" * 201]}}, "is no list of names"),
        ({"quantization_config": {**STATED, "modules_to_not_convert": [r"(?=a)b"]}}, "that can be matched safely"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized (fp8)"),
    ],
)
def test_what_is_wrong_with_it_is_said_in_two_lines(changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    assert what in said(tmp_path, **changed)


def test_a_configuration_in_mxfp4_is_taken(tmp_path: Path) -> None:
    config = {**make_config("gpt_oss").to_dict(), "quantization_config": STATED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_config(str(tmp_path), "main", Recorder())
