"""The function of experts against transformers' own eager loop, for every way in which tokens may be routed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.step import experts
from qlora.step.experts import GroupedLinear, Permute, Plain, Routing, Spread, experts_forward, grouped

TOKENS, CHOICES, COUNT = 12, 3, 5


def module_of(width: int = 64, inner: int = 24, transposed: bool = False, bias: bool = False) -> Any:
    """A decorated module of experts: Mixtral's, or gpt-oss' with its other sides, biases and interleaved rows."""
    from transformers import CONFIG_MAPPING
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    kind, module = ("gpt_oss", GptOssExperts) if transposed else ("mixtral", MixtralExperts)
    config = CONFIG_MAPPING[kind](hidden_size=width, intermediate_size=inner, num_local_experts=COUNT)
    made = module(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    config._experts_implementation = "eager"
    return made.requires_grad_(False)


def routed(how: str) -> Tensor:
    """Experts of each token, (T, K)."""
    generator = torch.Generator().manual_seed(1)
    if how == "even":
        return torch.arange(TOKENS * CHOICES).view(TOKENS, CHOICES) % COUNT
    if how == "skewed":  # three experts take all, the last two none
        return torch.stack([torch.randperm(CHOICES, generator=generator) for _ in range(TOKENS)])
    if how == "one token":
        return torch.tensor([[4, 0, 2]])
    return torch.stack([torch.randperm(COUNT, generator=generator)[:CHOICES] for _ in range(TOKENS)])


def inputs(index_TK: Tensor, width: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_TH = torch.randn(len(index_TK), width, generator=generator).requires_grad_()
    weights_TK = torch.rand(index_TK.shape, generator=generator).requires_grad_()
    return hidden_TH, weights_TK


def computed(module: Any, index_TK: Tensor, ours: bool) -> list[Tensor]:
    """Output and gradients of inputs and weights."""
    hidden_TH, weights_TK = inputs(index_TK)
    if ours:
        output = experts_forward(lambda rows: rows.dtype, module, hidden_TH, index_TK, weights_TK)
    else:
        output = module(hidden_TH, index_TK, weights_TK)
    factors = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * factors).sum(), (hidden_TH, weights_TK))]


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("chunk_bytes", [experts.CHUNK_BYTES, 4 * 48 * 64 * 2, 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", ["random", "even", "skewed", "one token"])
def test_every_routing_gives_what_the_eager_loop_gives(
    how: str, transposed: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in chunks of two experts, and of one; experts without a token, and fewer rows than experts."""
    monkeypatch.setattr(experts, "CHUNK_BYTES", chunk_bytes)
    module, index_TK = module_of(transposed=transposed), routed(how)
    ours, eager = computed(module, index_TK, True), computed(module, index_TK, False)
    assert all(map(close, ours, eager))
    again = computed(module, index_TK, True)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_nothing_but_places_is_kept_of_a_product() -> None:
    """Frozen weights need no input to go back through them: neither rows nor weights are saved."""
    module, index_TK = module_of(), routed("random")
    hidden_TH, _ = inputs(index_TK)
    saved: list[Tensor] = []
    routing = Routing(index_TK, COUNT)
    rows = Spread.apply(hidden_TH, routing)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one), lambda one: one):
        out = GroupedLinear.apply(rows, Plain(module, "gate_up_proj"), routing, torch.float32)
        Permute.apply(out, routing)
    assert saved == []


class Counting:
    """A stack that says which experts were read."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.read_ranges = weights, []
        self.shape = tuple(weights.shape)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        self.read_ranges.append((first, last))
        return self.weights[first:last].to(dtype)


def test_chunks_without_rows_are_not_read() -> None:
    stack = Counting(torch.randn(COUNT, 8, 64))
    index_TK = torch.tensor([[0, 3], [0, 3], [3, 0]])
    grouped(torch.randn(6, 64), stack, Routing(index_TK, COUNT), torch.float32)
    assert stack.read_ranges == [(0, COUNT)]
    stack.read_ranges.clear()
    grouped(torch.randn(2, 64), stack, Routing(index_TK[:1], COUNT), torch.float32)  # an answer's next token
    assert stack.read_ranges == [(0, 1), (3, 4)]


def test_a_chunk_is_at_most_256_mebibytes() -> None:
    """Of Qwen3-30B's gate and up (128, 1536, 2048) in bf16: 6 MiB an expert."""
    meta = torch.empty(128, 1536, 2048, dtype=torch.bfloat16, device="meta")
    stack = Counting(meta)
    index_TK = torch.empty(512, 8, dtype=torch.int64, device="meta")
    rows = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta")
    out = grouped(rows, stack, Routing(index_TK, 128), torch.bfloat16)
    assert tuple(out.shape) == (4096, 1536) and stack.read_ranges == [(0, 42), (42, 84), (84, 126), (126, 128)]
    largest = max(last - first for first, last in stack.read_ranges)
    assert largest * math.prod(stack.shape[1:]) * 2 <= 256 << 20


def test_rows_are_as_many_whatever_the_routing() -> None:
    for how in ("random", "even", "skewed"):
        routing = Routing(routed(how), COUNT)
        assert routing.rows == TOKENS * CHOICES and routing.bounds[-1] == routing.rows
        assert torch.equal(routing.order_S[routing.inverse_S], torch.arange(routing.rows))


def test_bf16_rows_are_multiplied_in_the_type_that_is_asked_for() -> None:
    """On a CPU without bf16 products: in fp32, rounded once."""
    module, index_TK = module_of(), routed("random")
    hidden_TH, weights_TK = (one.detach().bfloat16() for one in inputs(index_TK))
    half = module_of().bfloat16()
    wide = experts_forward(lambda rows: torch.float32, half, hidden_TH, index_TK, weights_TK)
    narrow = experts_forward(lambda rows: rows.dtype, half, hidden_TH, index_TK, weights_TK)
    exact = experts_forward(lambda rows: rows.dtype, module, hidden_TH.float(), index_TK, weights_TK.float())
    assert wide.dtype == narrow.dtype == torch.bfloat16
    assert float((wide.float() - exact).abs().mean()) <= 1.1 * float((narrow.float() - exact).abs().mean())


def test_experts_can_be_left_out_for_a_time() -> None:
    """Whoever looks at calls alone reads no weight, and the function before is there again."""
    experts.register(lambda rows: rows.dtype)
    module, index_TK = module_of(), routed("random")
    module.config._experts_implementation = experts.NAME
    hidden_TH, weights_TK = inputs(index_TK)
    with experts.skipping([module]):
        assert not module(hidden_TH, index_TK, weights_TK).any()
    assert module.config._experts_implementation == experts.NAME
    assert module(hidden_TH, index_TK, weights_TK).any()
