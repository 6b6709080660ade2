"""Each kernel by Triton's interpreter against its twin: a process of its own, for Triton asks once how it is to run.

Prints, for each kernel of a module and each type, how far the two are apart, relative to the largest value. (bf16 is
left out: the interpreter cuts it off where a GPU rounds it.)
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from qlora.model.nf4 import quantize_rows
from qlora.step.kernels import experts, launching, operators
from qlora.step.kernels.experts import Packed

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


def adapted(kind: torch.dtype) -> dict[str, float]:
    """Tiles that are not full, another rank and another row of x A' for each of the two."""
    found = {}
    for keeps in (False, True):
        e, g, both = torch.randn(40, 150).to(kind), torch.randn(40, 150).to(kind), torch.randn(40, 9).to(kind)
        ups = torch.randn(150, 3).to(kind), torch.randn(150, 6).to(kind)
        adapters, scales = (both[:, :3], both[:, 3:], *ups), (0.5, 2.0)
        (own_e, own_g), h = (e.clone(), g.clone()), torch.empty_like(e)
        launching.gated_adapted((own_e, own_g), adapters, scales, keeps, h)
        right = operators.gated_adapted(e, g, adapters, scales, keeps)
        pairs = ((h, right), (own_e, e), (own_g, g))
        found[f"gated adapted {keeps}"] = max(apart(*pair) for pair in pairs)
    return found


def turned(kind: torch.dtype) -> dict[str, float]:
    """Heads that lie apart, tables for every row and for all rows, columns that stay."""
    found = {}
    for form in operators.FORMS:
        for back, turned, rows in ((False, 16, 2), (True, 16, 1), (False, 12, 1), (True, 12, 2)):
            q, k = torch.randn(2, 7, 5, 16).to(kind).transpose(1, 2), torch.randn(2, 3, 7, 20).to(kind)[..., 2:18]
            tables = torch.randn(rows, 7, turned).to(kind), torch.randn(rows, 7, turned).to(kind)
            into = ops.rope_qk(q.to("meta"), k.to("meta"), *(one.to("meta") for one in tables), form, back)
            into = tuple(torch.empty_strided(one.shape, one.stride(), dtype=kind) for one in into)
            launching.rope_qk((q, k), tables, form, back, into)
            right = operators.rope_qk(q, k, tables, form, back)
            found[f"rope {form} {back} {turned}"] = max(apart(*pair) for pair in zip(into, right, strict=True))
    return found


def losses(kind: torch.dtype) -> dict[str, float]:
    """Rows that are no whole number of blocks, with a logit of minus infinity in each."""
    found = {}
    for factor, cap in ((1.0, 0.0), (0.5, 0.0), (2.0, 3.0)):
        logits, weights = (3 * torch.randn(3, 9001)).to(kind), torch.tensor([1.0, 0.0, 2.5])
        logits[:, 5000] = -float("inf")
        targets, own, into = torch.tensor([0, 4096, 9000]), logits.clone(), torch.empty(3)
        launching.cross_entropy(own, targets, weights, (factor, cap), into)
        right = operators.cross_entropy_(logits, targets, weights, factor, cap)
        found[f"loss {factor} {cap}"] = max(apart(into, right), apart(own, logits))
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


# Rows of each of five experts: even, all of one, none at the ends, one row, as many as a tile has and one more.
ROUTINGS = ((20, 20, 20, 20, 20), (0, 0, 90, 0, 0), (0, 70, 0, 20, 0), (1, 0, 0, 0, 0), (64, 65, 63, 1, 7))


def with_experts(kind: torch.dtype) -> dict[str, float]:
    """Experts narrow and wide, whose sides are no whole number of tiles; NF4's form and MXFP4's, forth and back."""
    found = {}
    for (out, width), back, mx in product(((144, 192), (272, 64)), (False, True), (False, True)):
        block = 32 if mx else 64
        codes = torch.randint(0, 256, (5, out * width // 2)).to(torch.uint8)
        sizes = torch.rand(5, out * width // block) + 0.5
        packed = Packed(codes, torch.randint(120, 130, sizes.shape).to(torch.uint8) if mx else sizes, TABLE, not mx)
        far = []
        for routing in ROUTINGS:
            ends = torch.tensor(routing).cumsum(0).int()
            rows = torch.randn(int(ends[-1]), out if back else width).to(kind)
            about = (int(out), int(width), block)
            into = torch.full((len(rows), width if back else out), float("nan")).to(kind)
            experts.launch(rows, (*packed[:3], ends), (*about, not mx), back, into)
            far.append(apart(into, experts.grouped(rows, packed, ends, about, back)))
        found[f"experts {out}x{width} {'back' if back else 'forth'} {'mxfp4' if mx else 'nf4'}"] = max(far)
    return found


TABLE = torch.linspace(-1, 1, 16)


def unnested(kind: torch.dtype) -> dict[str, float]:
    """To the bit, in whatever type rows are: more blocks than a program takes, the last of them not full."""
    absmax, nested = torch.randint(0, 256, (3, 1280)).to(torch.uint8), torch.rand(3, 5)
    about = (absmax, nested, torch.randn(256), torch.randn(3))
    into = torch.empty(3, 1100)
    experts.launch_unnest(*about, into)
    return {"unnest": float((into != experts.unnest(*about, 1100)).sum())}


def routed(kind: torch.dtype) -> dict[str, float]:
    """To the number: more choices than a program looks at at a time, and none; experts that nobody chose."""
    wrong = 0.0
    for tokens, most in ((1500, 4), (700, 1), (1, 7), (0, 7)):
        index_TK = torch.randint(0, most, (tokens, 2))
        right = experts.route(index_TK, 7)
        into = tuple(torch.full_like(one, -1) for one in right)
        experts.launch_route(index_TK, into)
        wrong += sum(float((one != other).sum()) for one, other in zip(into, right, strict=True))
    return {"route": wrong}


if __name__ == "__main__":
    torch.manual_seed(0)
    launching._on = lambda tensor: nullcontext()  # type: ignore[assignment]
    kinds = (torch.float32, torch.float16)
    modules = {
        "source": (gated, norms, adapted, turned, losses, dequantized),
        "experts_source": (with_experts, unnested, routed),
    }
    work = modules[sys.argv[1]]
    print(json.dumps({str(kind): {name: far for one in work for name, far in one(kind).items()} for kind in kinds}))
