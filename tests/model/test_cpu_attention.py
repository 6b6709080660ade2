"""Documents one by one on a CPU: against their definition in float64, and what is computed and kept for them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import numerics
from qlora.model.cpu_attention import NARROW, SHORT, SHORT_OF_WIDE, by_documents
from qlora.numerics import Numerics

HEADS, SHARED, WIDTH = 4, 2, 16
LENGTHS = (5, 1, SHORT + 16, 30)
OF_WIDE = (5, SHORT_OF_WIDE, SHORT_OF_WIDE + 16)


def drawn(
    dtype: torch.dtype, device: str = "cpu", width: int = WIDTH, lengths: tuple[int, ...] = LENGTHS
) -> list[Tensor]:
    """Query, key and value (N, heads, D)."""
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(sum(lengths), heads, width, generator=generator) for heads in (HEADS, SHARED, SHARED)]
    return [one.to(device, dtype).requires_grad_() for one in states]


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    parts = []
    for q, k, v in zip(*(torch.split(one, LENGTHS) for one in (query, key, value)), strict=True):
        k, v = (one.repeat_interleave(HEADS // SHARED, dim=1) for one in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        ahead = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(dim=-1)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v))
    return torch.cat(parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
def test_output_and_gradients_are_those_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    """bf16 has 8 bits: what comes out is rounded once, within 1/256 of it."""
    states = drawn(dtype)
    exact = [one.detach().double().requires_grad_() for one in states]
    gradient = torch.randn(sum(LENGTHS), HEADS, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    found, right = by_documents(*states, LENGTHS, 0.3), by_definition(*exact, 0.3)
    found.backward(gradient)
    right.backward(gradient.double())  # type: ignore[no-untyped-call]
    assert found.dtype == dtype
    for one, other in zip((found, *(one.grad for one in states)), (right, *(one.grad for one in exact)), strict=True):
        assert one is not None and other is not None
        assert (one.double() - other).norm() <= tolerance * other.norm()


class Seen(TorchDispatchMode):  # type: ignore[misc]
    """What attention is computed of: tokens and type of each query."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention" in func.name():
            at = 1 if "backward" in func.name() else 0
            self.queries.append((args[at].shape[2], args[at].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_document_is_computed_alone_and_short_ones_in_fp32(device: str) -> None:
    """That is why it is fast; a run's estimate, on meta, computes the same."""
    states, kept = drawn(torch.bfloat16, device), []
    with Seen() as seen, torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        by_documents(*states, LENGTHS, None).sum().backward()  # type: ignore[no-untyped-call]
    once = [(length, torch.float32 if length <= SHORT else torch.bfloat16) for length in LENGTHS]
    assert seen.queries == once * 2
    assert {one.dtype for one in kept if one.dim() == 3 and one.shape[-1] == WIDTH} == {torch.bfloat16}
    sizes = sum(one.nbytes for one in kept if one.shape[-1] == WIDTH)
    assert sizes == 2 * sum(LENGTHS) * WIDTH * (2 * HEADS + 2 * SHARED), "query, key, value, output: no copies"


@pytest.mark.parametrize(
    ("width", "run", "short"),
    [
        (NARROW, None, SHORT),
        (NARROW + 8, None, SHORT_OF_WIDE),
        (NARROW, Numerics(fp32_tokens=SHORT), SHORT),
        (NARROW + 8, Numerics(fp32_tokens=SHORT), SHORT_OF_WIDE),
        (NARROW, Numerics(), SHORT_OF_WIDE),  # began before heads were told apart
        (NARROW, Numerics(fp32_tokens=4), 4),
    ],
)
def test_of_wide_heads_and_in_runs_of_before_fewer_are_short(width: int, run: Numerics | None, short: int) -> None:
    with Seen() as seen, nullcontext() if run is None else numerics.in_force(run):
        by_documents(*drawn(torch.bfloat16, "meta", width, OF_WIDE), OF_WIDE, None)
    assert seen.queries == [(length, torch.float32 if length <= short else torch.bfloat16) for length in OF_WIDE]
