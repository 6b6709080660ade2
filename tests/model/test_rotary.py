"""A model's rotation is known by what it computes; with the kernel's function in its place it gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.model import rotary
from qlora.model.rotary import Form, form_of, put_in
from qlora.step.kernels import operators
from tests.families import FAMILIES, make_config, make_model


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


def other_way(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return plain(q, k, cos, -sin)


def keys_stay(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return plain(q, k, cos, sin)[0], k


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = plain(q, k, cos, sin)
    return q, k * 1.001


def in_float(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return plain(q.float(), k.float(), cos, sin)


def coarse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In bf16 it rounds to four bits."""
    q, k = plain(q, k, cos, sin)
    return (q, k) if q.dtype == torch.float32 else ((q.float() * 4).round().to(q) / 4, k)


def needs_five(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return plain(q, k, cos, sin)


@pytest.mark.parametrize("function", [other_way, keys_stay, scaled, in_float, coarse, needs_five, halves])
def test_any_other_function_is_left_alone(function: Callable[..., Any]) -> None:
    assert form_of(function) is None


def test_forms_are_known_by_what_they_compute() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as by_half
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as partly

    assert form_of(plain) == Form(operators.HALVES, False)
    assert form_of(partly) == Form(operators.HALVES, True)
    assert form_of(neighbours) == Form(operators.NEIGHBOURS, False)
    assert form_of(by_half) == Form(operators.NEIGHBOURS_BY_HALF, True)


def results_of(model: Any) -> tuple[Tensor, Tensor]:
    embedding = model.get_input_embeddings().weight.requires_grad_()
    ids = torch.arange(4, 34).view(2, 15)
    output = model(input_ids=ids, use_cache=False).logits
    output.square().mean().backward()
    return output.detach(), embedding.grad


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "glm", "stablelm"])
def test_states_and_gradients_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's; a wrapper around attention's forward (transformers renames an argument) is kept."""
    calls: list[bool] = []
    real = operators.rope_qk
    own, ours = (make_model(make_config(family)).requires_grad_(False) for _ in range(2))
    right = results_of(own)
    layers = own.config.num_hidden_layers
    assert put_in(ours) == layers
    monkeypatch.setattr(operators, "rope_qk", lambda *given: calls.append(given[-1]) or real(*given))  # type: ignore[func-returns-value]
    found = results_of(ours)
    assert calls == [False] * layers + [True] * layers
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert own.model.layers[0].self_attn.forward.__wrapped__ is not None
    assert type(ours.model.layers[0].self_attn).__name__ == type(own.model.layers[0].self_attn).__name__


def test_a_models_module_keeps_its_function() -> None:
    """Another model of the same family in the process computes with its own."""
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb
    model: Any = make_model(make_config("llama"))
    put_in(model)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert type(model.model.layers[0].self_attn).forward.__wrapped__.__globals__["apply_rotary_pos_emb"] is not before


def test_other_shapes_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads behind positions, tables of another type, and narrower tables for a function that takes none."""
    monkeypatch.setattr(rotary, "_Rotation", None)
    form = Form(operators.HALVES, False)
    q, k, tables = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 1, 8), torch.randn(2, 2, 7, 8)
    for given, named in (
        ((q, k, *tables), {"unsqueeze_dim": 2}),
        ((q.bfloat16().transpose(1, 2), k.bfloat16().transpose(1, 2), *tables), {}),
        ((torch.randn(7, 2, 4), torch.randn(7, 2, 4), *torch.randn(2, 7, 2, 4)), {}),
    ):
        right = plain(*given, **named)
        found = rotary._rotated(*given, own=plain, form=form, **named)
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def test_a_model_whose_own_function_is_another_is_counted() -> None:
    """GPT-OSS pairs halves by tables of half the width; Gemma 3 has a table for each kind of layer."""
    for family, tables in (("llama", 0), ("gemma3", 0), ("gpt_oss", 1)):
        model: Any = make_model(make_config(family))
        assert put_in(model) == (0 if tables else model.config.num_hidden_layers)
        assert rotary.not_turned(model) == tables


def test_a_module_that_turns_nothing_stays_what_it_is() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert put_in(module) == 0 and type(module[0]) is nn.Linear
