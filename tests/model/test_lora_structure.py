"""Structure is seen from what is called with what, whatever things are called."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, silu

from qlora.model.attention import register
from qlora.model.lora_structure import Gated, gated_of, sharing_of, unread_of
from tests.families import make_config, make_model


class Mlp(nn.Module):
    """`how` it differs from down(silu(gate(x)) * up(x))."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        if how == "has a scale":
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        gate = gelu(self.b(x)) if self.how == "gelu" else silu(self.b(x))
        if self.how.startswith("caps"):
            gate = gate.clamp(max=float(self.how.split()[-1]))
        h = gate * self.a(x + 0.0 if self.how == "other input" else x)
        y = self.c(dropout(h, 0.02, self.training) if self.how == "drops" else h)
        if self.how == "twice":
            y = y + self.c(h)
        return y * 2 if self.how == "scales" else y


@pytest.mark.parametrize(
    "how", ["", "gelu", "caps at 0.5", "caps at 16", "drops", "other input", "twice", "scales", "has a scale"]
)
def test_an_mlp_is_known_by_what_it_computes(how: str) -> None:
    model = nn.ModuleDict({"layer": Mlp(how)})
    layers = {f"layer.{name}": getattr(model["layer"], name) for name in "abc"}
    found = gated_of(layers, model)
    assert [one.layers for one in found] == ([("b", "a", "c")] if not how else [])
    assert gated_of(dict(list(layers.items())[:2]), model) == []
    assert type(model["layer"].a) is nn.Linear and model["layer"].training


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_that_share_an_input_are_seen_without_reading_a_weight(device: str) -> None:
    register()  # as whoever builds a model does: masks on meta are told by the batch
    model: Any = make_model(make_config("qwen3")).to(device)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "head" not in name}
    for layer in layers.values():
        layer.weight = None
    found = [(one.module, one.layers) for one in sharing_of(layers, model)]
    expected = [
        (getattr(layer, module), names)
        for layer in model.model.layers
        for module, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
    ]
    assert found == expected


def test_a_trunk_that_cannot_be_run_shares_nothing() -> None:
    model: Any = make_model(make_config("llama"))
    layers = {name: one for name, one in model.named_modules() if name.endswith("_proj")}
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    assert sharing_of(layers, model) == []


def mlps_of(model: Any) -> list[Gated]:
    return [Gated(layer.mlp, ("gate_proj", "up_proj", "down_proj")) for layer in model.model.layers]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("family", "unread"),
    [("llama", True), ("qwen3", True), ("granite", True), ("gemma2", False), ("gemma3", False), ("olmo2", False)],
)
def test_outputs_that_are_only_added_are_seen(family: str, unread: bool, device: str) -> None:
    """Granite multiplies them by a constant; Gemma's and OLMo's norms behind an MLP read what it gives."""
    register()
    model: Any = make_model(make_config(family)).to(device)
    kinds = [type(one) for one in model.modules()]
    assert unread_of(mlps_of(model), model) == ({id(layer.mlp) for layer in model.model.layers} if unread else set())
    assert [type(one) for one in model.modules()] == kinds
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


def test_an_output_that_is_read_as_well_is_not_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added, and its size decides about something: what a layer gives then follows from its values."""
    model: Any = make_model(make_config("llama"))
    layer = type(model.model.layers[0])
    real = layer.forward

    def twice(self: Any, hidden: Tensor, *rest: Any, **named: Any) -> Tensor:
        return real(self, hidden, *rest, **named) + self.mlp(hidden).square()  # type: ignore[no-any-return]

    monkeypatch.setattr(layer, "forward", twice)
    assert unread_of(mlps_of(model), model) == set()


def test_what_was_looked_at_is_not_held_until_cycles_are_collected() -> None:
    """Classes that watch are cycles by themselves; no tensor is behind them, which on a card would be its memory."""
    register()
    model: Any = make_model(make_config("qwen3"))
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "head" not in name}
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gated = gated_of(layers, model)
        assert gated and sharing_of(layers, model)
        unread_of(gated, model)
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, Tensor) and one.numel() > 1]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
