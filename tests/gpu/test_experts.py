"""On a GPU: the product with experts in 4 bit is the twins', forth and back, the same when done again, and waits for
nobody.

`pytest tests/gpu/test_experts.py`; the last test prints both forms' figures with `-s` (`tools/bench/experts.py` keeps
them).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import device as hardware
from qlora.device import current, is_card, peak_bytes, release
from qlora.model.experts import Slab, fill
from qlora.recipe.sections import QuantizationSection
from qlora.step.experts import IN_CHUNKS, IN_TRITON, Routing, grouped
from qlora.step.kernels import trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_card(current()), reason="needs a CUDA GPU"),
    pytest.mark.skipif(is_card(current()) and not trial.multiplies_experts(current()), reason="needs Triton"),
]
ROUTINGS = ("even", "skewed", "one token")


def slab_of(count: int, out: int, width: int) -> Any:
    drawn = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    slab = Slab((count, out, width), QuantizationSection())
    fill(slab, lambda expert: lambda start, end: drawn[start:end].roll(expert, 1).to(current()), current())
    return slab


def routed(how: str, count: int, tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if how == "one token":
        return torch.arange(8)[None].to(current()) % count
    most = count if how == "even" else 9
    rows = [torch.randperm(most, generator=generator)[:8] for _ in range(tokens)]
    return torch.stack(rows).to(current())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("how", ROUTINGS)
def test_it_gives_what_chunks_give_and_the_same_again(how: str, back: bool, kind: torch.dtype) -> None:
    """To the rounding of the type; 20 times the same bits."""
    slab, index_TK = slab_of(16, 160, 192), routed(how, 16)
    routing, by_torch = Routing(index_TK, 16, True), Routing(index_TK, 16)
    for name in ("expert_S", "order_S", "inverse_S", "token_S", "ends_E"):
        assert torch.equal(getattr(routing, name), getattr(by_torch, name)), name
    rows = torch.randn(routing.rows, 160 if back else 192, device=current()).to(kind)
    slab.by = IN_TRITON
    found = grouped(rows, slab, routing, kind, back)
    assert all(torch.equal(found, grouped(rows, slab, routing, kind, back)) for _ in range(20))
    slab.by = IN_CHUNKS
    right = grouped(rows, slab, by_torch, kind, back)
    step = 2**-8 if kind == torch.bfloat16 else 2**-11
    assert float((found - right).abs().max()) <= 2 * step * float(right.abs().max())


def test_nothing_is_read_back() -> None:
    """torch raises where the host would wait for the device."""
    slab, index_TK = slab_of(16, 160, 192), routed("even", 16)
    rows = torch.randn(index_TK.numel(), 192, device=current()).bfloat16()
    grouped(rows, slab, Routing(index_TK, 16, True), torch.bfloat16)  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped(rows, slab, Routing(index_TK, 16, True), torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_of_qwen3_30b_is_faster_than_in_chunks() -> None:
    """Gate and up of 128 experts (1,536 x 2,048), 2,048 tokens; on consumer cards torch has a loop."""
    slab, index_TK = slab_of(128, 1536, 2048), routed("even", 128, 2048)
    rows = torch.randn(index_TK.numel(), 2048, device=current()).bfloat16()
    seconds, peaks = {}, {}
    for by in (IN_TRITON, IN_CHUNKS):
        slab.by = by
        for turn in range(6):
            release(current())
            hardware.synchronize(current())
            began = time.perf_counter()
            grouped(rows, slab, Routing(index_TK, 128, by == IN_TRITON), torch.bfloat16)
            hardware.synchronize(current())
            took = time.perf_counter() - began
            seconds[by] = took if turn < 2 else min(seconds[by], took)
        peaks[by] = peak_bytes(current()) or 0
        print(f"{by}: {1000 * seconds[by]:.2f} ms, {peaks[by] / 2**20:.0f} MiB")
    assert peaks[IN_TRITON] < peaks[IN_CHUNKS] - (150 << 20)
    assert seconds[IN_TRITON] < seconds[IN_CHUNKS]
