"""4-bit weights have the same bytes whichever device quantizes them, blocks of zeros and nested constants included."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.model.nf4 import Quantized, dequantize, quantize_rows
from qlora.prove.proof import Outcome, Place, Proof, all_equal
from qlora.third_party import import_bitsandbytes

SHAPE = (512, 1024)  # of the weight: 8,192 blocks, 32 nested ones
BLOCK = 64


def run(place: Place) -> Outcome:
    weight = _weight()
    different = []
    for kind in ("nf4", "fp4"):
        ours = _parts(_quantized(weight, kind, place.device))
        theirs = _parts(
            _quantized(weight, kind, torch.device("cpu")) if place.on_card else _by_bitsandbytes(weight, kind)
        )
        different += [f"{kind}: {name}" for name in ours if not all_equal([ours[name]], [theirs[name]])]
    other = "the CPU's" if place.on_card else "bitsandbytes' own"
    said = f"{weight.numel():,} weights, two types: " + (", ".join(different) or f"every byte is {other}")
    return Outcome(not different, said, {"weights": weight.numel(), "different": ", ".join(different)})


def _weight() -> Tensor:
    """Usual weights, with what quantizers stumble over: a block of zeros, tiny and huge ones, values that tie."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(SHAPE, generator=generator).mul_(0.02).bfloat16()
    blocks = weight.view(-1, BLOCK)
    blocks[5] = 0.0
    blocks[77] *= 1e-20
    blocks[78] *= 1e6
    blocks[79] = torch.linspace(-1, 1, BLOCK).bfloat16()
    return weight


def _quantized(weight: Tensor, kind: str, device: torch.device) -> Quantized:
    return quantize_rows(lambda start, end: weight[start:end].to(device), SHAPE, kind, True, device)


def _by_bitsandbytes(weight: Tensor, kind: str) -> Quantized:
    data, state = import_bitsandbytes().functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    return Quantized(data, state)


def _parts(quantized: Quantized) -> dict[str, Tensor]:
    state = quantized.state
    return {
        "codes": quantized.data.cpu().view(-1),
        "constants": state.absmax.cpu(),
        "nested constants": state.state2.absmax.cpu(),
        "offset": torch.as_tensor(state.offset).cpu().view(-1),
        "dequantized": dequantize(quantized, torch.bfloat16).cpu(),
    }


PROOF = Proof(
    name="4-bit weights",
    promise="a base has the same bytes in 4 bit on every device",
    tolerance="0: every byte",
    source="QLoRA (Dettmers et al. 2023), section 3; bitsandbytes' kernels",
    run=run,
)
