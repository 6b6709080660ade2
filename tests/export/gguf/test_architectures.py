"""Names, keys and changes of weights for the seven families; what llama.cpp's graphs cannot compute is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.errors import ExportError
from qlora.export.gguf.architectures import Layout, lay_out
from qlora.export.gguf.family import INTERLEAVE, GgufTensor
from tests.export.gguf.cases import shapes_of
from tests.families import FAMILIES, WINDOW, make_config, make_model


def layout(family: str, **overrides: Any) -> Layout:
    model = make_model(make_config(family, overrides=overrides))
    return lay_out(model, shapes_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_name(family: str) -> None:
    model = make_model(make_config(family))
    tensors = lay_out(model, shapes_of(model)).tensors
    assert len({tensor.name for tensor in tensors}) == len(tensors) == len(shapes_of(model))
    assert ("output.weight" in {tensor.name for tensor in tensors}) is not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_are_undone_exactly(family: str) -> None:
    for tensor in layout(family).tensors:
        rows = torch.randint(-8, 8, tensor.shape).float()
        assert torch.equal(tensor.inverse(tensor.to_gguf(rows)), rows), tensor.name


def test_only_llama_and_mistral_interleave_and_only_gemma_adds_one() -> None:
    for family in FAMILIES:
        changes = {tensor.parameter: tensor.change.name for tensor in layout(family).tensors}
        turned = {name for name, change in changes.items() if change == "interleave"}
        shifted = {name for name, change in changes.items() if change == "plus one"}
        assert bool(turned) is (family in ("llama", "mistral"))
        assert all(name.split(".")[-2] in ("q_proj", "k_proj") for name in turned)
        assert bool(shifted) is family.startswith("gemma")
        assert all(name.endswith("norm.weight") for name in shifted)


def test_rows_of_a_head_are_interleaved_head_by_head() -> None:
    """Within a head of 4: rows 0 1 | 2 3 become 0 2 1 3. A block holds whole heads, so blocks may be changed alone."""
    tensor = GgufTensor("blk.0.attn_q.weight", "q", (8, 1), INTERLEAVE, 4)
    rows = torch.arange(8.0).view(8, 1)
    assert tensor.to_gguf(rows).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(torch.cat([tensor.to_gguf(rows[:4]), tensor.to_gguf(rows[4:])]), tensor.to_gguf(rows))
    assert tensor.to_gguf(rows.flatten()).tolist() == tensor.to_gguf(rows).flatten().tolist()  # biases turn too


def test_gemmas_windows() -> None:
    """Two layers, the second one full: usual for Gemma 2's period of 2, said layer by layer for Gemma 3's of 6."""
    two, three = dict(layout("gemma2").keys), dict(layout("gemma3").keys)
    assert two["gemma2.attention.sliding_window"] == three["gemma3.attention.sliding_window"] == WINDOW
    assert "gemma2.attention.sliding_window_pattern" not in two
    assert three["gemma3.attention.sliding_window_pattern"] == [True, False]
    assert three["gemma3.rope.freq_base"] == 1e6 and three["gemma3.rope.freq_base_swa"] == 1e4
    assert two["gemma2.attn_logit_softcapping"] == 50.0 and two["gemma2.final_logit_softcapping"] == 30.0


def test_a_window_that_llama_cpp_ignores_is_said() -> None:
    assert any(f"beyond {WINDOW} tokens" in notice for notice in layout("mistral").notices)
    assert not layout("mistral", sliding_window=None).notices
    assert dict(layout("phi3").keys)["phi3.attention.sliding_window"] == 0


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar = 99"),
        ("gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar = 99"),
        ("gemma2", {"tie_word_embeddings": False}, "head is not its embedding"),
        ("qwen2", {"head_dim": 32}, "heads of 32 dims"),
        ("qwen3", {"attention_bias": True}, None),
    ],
)
def test_settings_that_its_graph_ignores_are_refused(family: str, overrides: dict[str, Any], message: str) -> None:
    if message is None:
        with pytest.raises(ExportError):
            layout(family, **overrides)
        return
    with pytest.raises(ExportError, match=message) as caught:
        layout(family, **overrides)
    assert "to='hf'" in caught.value.hint


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="'gpt_neox' models cannot be written as GGUF here") as caught:
        layout("gpt_neox")
    assert "to='hf'" in caught.value.hint
