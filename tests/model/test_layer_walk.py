"""Weights are in a model for the time of a block only. (That layer by layer gives what the whole model gives is tested
where exports are measured: tests/export/test_candidates.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora.model.layer_walk import WeightHolder, layers_of


class Toy(nn.Module):
    """Two layers on `meta`; transformers' names for what a holder asks of a model."""

    _keep_in_fp32_modules_strict = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
            self.norm = nn.LayerNorm(2)
        self.register_buffer("scale", torch.empty(2, dtype=torch.float64, device="meta"))


def holder_of(model: Toy) -> WeightHolder:
    names = [name for name in model.state_dict() if name != "layers.1.bias"]

    def fetch(name: str, empty: Tensor) -> Tensor:
        if name == "layers.1.weight":
            raise KeyError(name)
        return torch.ones(empty.shape, dtype=torch.float16)

    return WeightHolder(model, names, fetch, torch.device("cpu"), torch.bfloat16)


def test_weights_are_there_for_the_time_of_a_block() -> None:
    model = Toy()
    holder = holder_of(model)
    assert holder.names_under(model.layers[0]) == ["layers.0.weight", "layers.0.bias"]
    assert holder.names_under(model.layers[1]) == ["layers.1.weight"], "only what is known"
    with holder.holding(["layers.0.weight", "norm.weight", "scale"]):
        weight = model.layers[0].weight
        assert weight.dtype == torch.bfloat16 and float(weight.sum()) == 6 and not weight.requires_grad
        assert model.layers[0].bias.is_meta
        assert model.norm.weight.dtype == torch.float32, "what transformers keeps in fp32"
        assert model.scale.dtype == torch.float64 and not isinstance(model.scale, nn.Parameter)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_after_an_error_the_model_is_empty_again() -> None:
    model = Toy()
    with pytest.raises(KeyError), holder_of(model).holding(["layers.0.weight", "layers.1.weight"]):
        pass
    with pytest.raises(ValueError, match="ours"), holder_of(model).holding(["layers.0.weight"]):
        raise ValueError("ours")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_layers_that_are_in_no_list_are_not_found() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **size))
    assert list(layers_of(model)) == list(model.model.layers)
    model.config.num_hidden_layers = 4
    with pytest.raises(LookupError, match="LlamaForCausalLM: its 4 layers are not found"):
        layers_of(model)
