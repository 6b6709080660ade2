"""A 4-bit layer takes a linear one's place, and its weight is the one that it was given."""

from __future__ import annotations

import torch
from torch import nn

from qlora.model.four_bit_layers import set_4bit, swap_linear
from qlora.model.nf4 import dequantize, quantize_rows
from qlora.recipe.sections import QuantizationSection


def test_a_layer_is_put_in_place_and_given_its_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False, device="meta"))
    layer = swap_linear(model, "0", model[0], QuantizationSection())
    assert model[0] is layer and layer.weight.is_meta and (layer.in_features, layer.out_features) == (64, 32)
    assert layer.support_avx512bf16_for_cpu is False and layer.bias is None
    weight = torch.randn(32, 64).bfloat16()
    quantized = quantize_rows(lambda start, end: weight[start:end], (32, 64), "nf4", True, torch.device("cpu"))
    set_4bit(layer, quantized)
    assert layer.quant_state is quantized.state and not layer.weight.requires_grad
    inputs = torch.randn(3, 64)
    expected = inputs @ dequantize(quantized, torch.float32).t()
    assert torch.allclose(layer(inputs.bfloat16()).float(), expected, atol=0.2)
