"""An adapter's two files as data: patterns match as in peft, without its engine, and null is the default."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from qlora.errors import ExportError
from qlora.model.adapter_config import AdapterConfig, ProvenanceFile, checked, first_matches, shown

MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 10) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1, 10) for name in ("gate", "up", "down")),
    *("lm_head", "model.embed_tokens"),
]
PATTERNS = [
    ["q_proj"],
    ["layers.0.self_attn.q_proj", "q_proj"],
    ["q_proj", "layers.0.self_attn.q_proj"],
    ["model.layers.1.mlp.up_proj"],
    ["proj"],
    [r"layers\.(0|1)\..*", "lm_head"],
    ["lm_head", r".*"],
    [r".*\.mlp\..*", "up_proj", "q_proj"],
    ["up_proj", r".*\.mlp\..*", "q_proj"],
    [r"[qk]_proj", r"layers\.\d+\.self_attn\.[vo]_proj"],
    [r"^model\.layers\.1.*", "v_proj"],
    ["k_proj|v_proj", "o_proj$"],
    [r"(?:mlp|self_attn)\.(?:up|q)_proj"],
    ["a)|(lm_head"],
    [r"layers\.\d{1,2}\.mlp\.down_proj"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids="-".join)
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    table = {pattern: number for number, pattern in enumerate(patterns)}
    theirs = {module: table[key] for module in MODULES if (key := get_pattern_key(patterns, module)) in table}
    assert first_matches(table, MODULES, "file: rank_pattern") == theirs


def test_ten_thousand_names_for_ten_thousand_modules() -> None:
    """Names are looked up, not tried one after the other: 100 million trials would take minutes."""
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(10_000)]
    table = {name: number for number, name in enumerate(reversed(modules))}
    started = time.process_time()
    assert first_matches(table, modules, "x") == table
    assert time.process_time() - started < 30, "it is 0.05 s"


def test_no_pattern_of_a_file_reaches_pythons_engine() -> None:
    """`re` compiles nothing but what stands in the source: a pattern that goes to it is seen here."""
    re.purge()
    before = re._cache.copy() if hasattr(re, "_cache") else {}  # type: ignore[attr-defined]
    first_matches({r"(a+)+\w*x": 1}, MODULES, "x")
    compiled = [key for key in getattr(re, "_cache", {}) if key not in before]
    assert not any("(a+)+" in str(key) for key in compiled)


def test_null_is_the_default_and_unknown_keys_pass() -> None:
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": None, "revision": None, "newer": [1]}
    config = checked(AdapterConfig, content, Path("adapter_config.json"))
    assert (config.rank_pattern, config.revision, config.base_model_name_or_path) == ({}, "main", "")
    ours = {"base": "a/b", "revision": "c", "quantization": {"type": "fp4", "newer": 1}, "newer": {}}
    section = checked(ProvenanceFile, ours, Path("qlora.json")).section()
    assert (section.type, section.double_quant) == ("fp4", True)


def test_a_refusal_names_file_key_and_value() -> None:
    with pytest.raises(ExportError) as caught:
        checked(AdapterConfig, {"peft_type": "LORA", "r": "eight", "lora_alpha": 8}, Path("a/adapter_config.json"))
    assert caught.value.what == "a/adapter_config.json: r is wrong: Input should be a valid integer (it is 'eight')"


def test_a_strangers_name_is_shown_short_and_without_control_characters() -> None:
    assert shown("model.layers.0.q_proj") == "model.layers.0.q_proj"
    assert shown("\x1b[2J") == r"'\x1b[2J'"
    assert len(shown("x" * 5000)) == 201
