"""bitsandbytes' 4-bit layer in the place of a linear one: put there without weights, and given them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora.model.nf4 import Quantized
from qlora.third_party import import_bitsandbytes

if TYPE_CHECKING:
    from qlora.recipe.sections import QuantizationSection


def swap_linear(model: Any, name: str, linear: nn.Linear, quantization: QuantizationSection) -> Any:
    """Puts a 4-bit layer, still without weights, in the place of a linear layer, and returns it."""
    layer = import_bitsandbytes().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        device="meta",
    )
    # On CPUs with AVX512-BF16 the layer's first evaluation forward would rewrite its weight in place into another
    # packing, and training, dequantizing and merging afterwards would read garbage.
    layer.support_avx512bf16_for_cpu = False
    model.set_submodule(name, layer)
    return layer


def set_4bit(layer: Any, quantized: Quantized, kind: Any = None) -> None:
    """Gives a 4-bit layer its weight, as bitsandbytes does it itself (as a parameter of class `kind`)."""
    layer.weight = (kind or import_bitsandbytes().nn.Params4bit)(
        quantized.data,
        requires_grad=False,
        quant_state=quantized.state,
        blocksize=quantized.state.blocksize,
        compress_statistics=quantized.state.nested,
        quant_type=quantized.state.quant_type,
        quant_storage=quantized.data.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = quantized.state
