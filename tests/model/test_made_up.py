"""A base without a file: what it is made of is what loading makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora.events import Sinks
from qlora.model.load import load_base
from qlora.model.made_up import load_nothing, load_random
from qlora.model.meta_model import build_unmatched, choose_attention
from qlora.model.resolve import resolve
from qlora.recipe.sections import QuantizationSection
from tests.families import make_config

CPU, NF4 = torch.device("cpu"), QuantizationSection()


def kinds(model: Any) -> dict[str, tuple[Any, ...]]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (type(value).__name__, tuple(value.shape), value.dtype) for name, value in named.items()}


def made(fill: Any) -> Any:
    text = make_config("llama")
    model = build_unmatched(text, choose_attention(text, "auto", "random"), "random")
    fill(model)
    return model


def test_random_weights_have_the_form_of_loaded_ones(llama: Path) -> None:
    loaded = load_base(resolve(str(llama), "main", Sinks()), NF4, "auto", CPU, Sinks())
    torch.manual_seed(0)
    model = made(lambda model: load_random(model, NF4, CPU))
    assert kinds(model) == kinds(loaded)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_nothing_has_the_form_and_no_bytes(llama: Path) -> None:
    loaded = load_base(resolve(str(llama), "main", Sinks()), NF4, "auto", CPU, Sinks())
    model = made(lambda model: load_nothing(model, NF4))
    assert kinds(model) == kinds(loaded)
    assert all(parameter.is_meta for parameter in model.parameters())
