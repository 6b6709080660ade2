"""4-bit quantization in plain torch: what the codes of bitsandbytes and of our own way are checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.model.nf4 import BLOCK, Quantized, quantize_rows

# QLoRA appendix E; bitsandbytes/functional.py, get_4bit_type("nf4").
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, over the largest (12): bitsandbytes/functional.py, get_4bit_type("fp4").
FP4_VALUES = tuple(
    sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)


def quantize(weight: Tensor, quant_type: str, double_quant: bool, device: torch.device) -> Quantized:
    """A weight that lies in memory, through `quantize_rows`."""
    return quantize_rows(lambda start, end: weight[start:end], tuple(weight.shape), quant_type, double_quant, device)


def reference_quantize(weight: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes (uint8, numel) and absmax (float32, one a block of 64) of `weight`, in plain torch.

    The nearest value is found by the midpoints between neighbours; a value on a midpoint takes the lower one, as
    torch.bucketize does.
    """
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)[: flat.numel()]
    values, order = values_of(quant_type).sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    return order[torch.bucketize(scaled, midpoints)].to(torch.uint8), absmax


def reference_dequantize(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], quant_type: str) -> Tensor:
    """The weight that codes and absmax stand for, float32, in plain torch."""
    scale = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return (values_of(quant_type)[codes.long()] * scale).view(shape)


def unpack(data: Tensor, numel: int) -> Tensor:
    """One code a byte from bitsandbytes' two: the first value of a pair is in the upper four bits."""
    pairs = data.view(torch.uint8).reshape(-1)
    return torch.stack((pairs >> 4, pairs & 0xF), dim=1).reshape(-1)[:numel]


def values_of(quant_type: str) -> Tensor:
    """The 16 numbers that the codes stand for, in the order of the codes, float32."""
    return torch.tensor(NF4_VALUES if quant_type == "nf4" else FP4_VALUES, dtype=torch.float32)
