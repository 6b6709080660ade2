"""Each kernel by Triton's interpreter against its twin: a process of its own, for Triton asks once how it is to run.

Prints, for each kernel and type, how far the two are apart, relative to the largest value. (bf16 is left out: the
interpreter cuts it off where a GPU rounds it.)
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from qlora.model.nf4 import quantize_rows
from qlora.step.kernels import launching, operators

ops = torch.ops.qlora


def apart(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max() / right.double().abs().max())


def gated(kind: torch.dtype) -> dict[str, float]:
    e, g, grad = (torch.randn(7, 300).to(kind) for _ in range(3))
    h = torch.empty_like(e)
    launching.gated(e, g, h)
    found = {"gated": apart(h, operators.gated(e, g))}
    ours, right = ([one.clone() for one in (grad, e, g)] for _ in range(2))
    launching.gated_backward(*ours)
    operators.gated_backward_(*right)
    return found | {
        f"gated backward {at}": apart(one, other) for at, (one, other) in enumerate(zip(ours, right, strict=True))
    }


def norms(kind: torch.dtype) -> dict[str, float]:
    found = {}
    for from_one in (False, True):
        x, grad, weight = torch.randn(5, 200).to(kind), torch.randn(5, 200).to(kind), torch.randn(200).to(kind)
        into = torch.empty_like(x), torch.empty(5)
        launching.rms_norm(x, weight, 1e-5, from_one, into)
        right = operators.rms_norm(x, weight, 1e-5, from_one)
        back = torch.empty_like(x)
        launching.rms_norm_backward(grad, x, weight, right[1], from_one, back)
        found[f"norm {from_one}"] = max(apart(*pair) for pair in zip(into, right, strict=True))
        twin = operators.rms_norm_backward(grad, x, weight, right[1], from_one)
        found[f"norm backward {from_one}"] = apart(back, twin)
    return found


def dequantized(kind: torch.dtype) -> dict[str, float]:
    """To the bit: values whose last program is not full, and a last nested block that is not either."""
    weight = torch.randn(70, 448).bfloat16()
    quantized = quantize_rows(lambda start, end: weight[start:end], (70, 448), "nf4", True, torch.device("cpu"))
    state = quantized.state
    tables = (state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    found = torch.empty(70, 448, dtype=kind)
    launching.dequantize(quantized.data, tables, found)
    right = operators.dequantize(quantized.data, tables, (70, 448), kind)
    return {"dequantize": float((found != right).sum())}


if __name__ == "__main__":
    torch.manual_seed(0)
    launching._on = lambda tensor: nullcontext()  # type: ignore[assignment]
    kinds = (torch.float32, torch.float16)
    print(json.dumps({str(kind): gated(kind) | norms(kind) | dequantized(kind) for kind in kinds}))
