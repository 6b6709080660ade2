"""What llama.cpp will compute from our keys is what transformers computes, for every kind of scaled positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora.errors import ExportError
from qlora.export.gguf import architectures, rope
from tests.export.gguf.cases import LINEAR, LLAMA3, LONGROPE, YARN, shapes_of
from tests.families import make_config, make_model


def described(family: str, parameters: dict[str, Any], **more: Any) -> architectures.Layout:
    overrides = {"rope_parameters": dict(parameters), "sliding_window": None, **more}
    model = make_model(make_config(family, overrides=overrides))
    return architectures.lay_out(model, shapes_of(model))


@pytest.mark.parametrize("parameters", [LINEAR, YARN, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}])
def test_scaled_positions_are_keys(parameters: dict[str, Any]) -> None:
    keys = dict(described("qwen3", parameters).keys)
    assert keys["qwen3.rope.scaling.type"] == parameters["rope_type"]
    assert keys["qwen3.rope.scaling.factor"] == parameters["factor"]
    assert keys["qwen3.rope.freq_base"] == 10000.0


def test_llama3_positions_are_a_tensor_and_no_key() -> None:
    layout = described("llama", LLAMA3)
    factors = layout.constants["rope_freqs.weight"]
    assert factors.dtype == np.float32 and factors.shape == (8,)
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0)
    assert not [key for key, _ in layout.keys if "scaling" in key]


def test_longrope_is_two_tensors_and_a_factor_on_attention() -> None:
    layout = described("phi3", LONGROPE, original_max_position_embeddings=128)
    assert set(layout.constants) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    expected = (1 + np.log(512 / 128) / np.log(128)) ** 0.5
    assert dict(layout.keys)["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)
    assert any("size of its context" in notice for notice in layout.notices)


def test_another_factor_on_attention_is_said_as_a_multiple_of_the_usual_one() -> None:
    usual = dict(described("qwen3", YARN).keys)
    assert "qwen3.rope.scaling.attn_factor" not in usual
    keys = dict(described("qwen3", {**YARN, "attention_factor": 1.0}).keys)
    assert keys["qwen3.rope.scaling.attn_factor"] == pytest.approx(1.0 / (0.1 * np.log(4.0) + 1.0))


@pytest.mark.parametrize(
    ("family", "parameters", "message"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, "'dynamic' positions"),
        ("qwen3", LLAMA3, "'llama3' positions in this architecture"),
        ("qwen3", {**YARN, "truncate": False}, "not rounded"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(family: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        described(family, parameters)
    assert "to='hf'" in caught.value.hint


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, LINEAR])
def test_a_misread_configuration_is_noticed(parameters: dict[str, Any]) -> None:
    """The trap: keys that load, and positions that turn by other angles. The model's own buffer is the reference."""
    config = make_config("llama", overrides={"rope_parameters": dict(parameters)})
    own = rope.reference_ropes(make_model(config))
    rope.describe(config, 16, own, takes_factors=("llama3", "longrope"))
    config.rope_parameters["factor"] = parameters["factor"] * 1.1
    with pytest.raises(ExportError, match="other angles"):
        rope.describe(config, 16, own, takes_factors=("llama3", "longrope"))


def test_a_misread_factor_on_attention_is_noticed() -> None:
    config = make_config("llama", overrides={"rope_parameters": dict(YARN)})
    own = rope.reference_ropes(make_model(config))
    config.rope_parameters["attention_factor"] = 1.0
    with pytest.raises(ExportError, match=r"scale attention by 1\.0000"):
        rope.describe(config, 16, own, takes_factors=("llama3", "longrope"))


@pytest.mark.parametrize("value", [None, "8", 0, -1, True, [8.0], float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_a_factor_that_is_no_number_is_named(kind: str, value: object) -> None:
    given = {"rope_type": kind, "rope_theta": 10000.0, "factor": value, "original_max_position_embeddings": 64}
    given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = SimpleNamespace(rope_parameters=given, max_position_embeddings=512)
    with pytest.raises(ExportError, match="factor of the rotary positions is no number above 0"):
        rope.describe(config, 16, {"": rope.ReferenceRope(np.ones(8), 1.0)}, takes_factors=("llama3", "longrope"))
