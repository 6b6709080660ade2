"""The function of experts against transformers' own eager loop, for every way in which tokens may be routed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.step import experts
from qlora.step.experts import (
    IN_CHUNKS,
    IN_TRITON,
    GroupedLinear,
    Packed,
    PackedStack,
    Permute,
    Plain,
    Routing,
    Spread,
    experts_forward,
    grouped,
    has_kernel,
)
from qlora.step.kernels import trial
from tests.step.launches import Counter

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


class InFourBits:
    """A stack that the kernel can decode, and that says how often it was read otherwise."""

    block = 64

    def __init__(self, shape: tuple[int, int, int], by: str | None = None, where: str = "cpu") -> None:
        generator, values = torch.Generator().manual_seed(4), math.prod(shape[1:])
        self.shape, self.by, self.reads, self.unpacked = shape, by, 0, 0
        self.codes = torch.randint(0, 256, (shape[0], values // 2), generator=generator).to(torch.uint8).to(where)
        self.constants = torch.rand(shape[0], values // 64, generator=generator).to(where)
        self.table = torch.linspace(-1, 1, 16).to(where)

    def packed(self) -> Packed:
        self.unpacked += 1
        return Packed(self.codes, self.constants, self.table, True)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        self.reads += 1
        codes = self.codes[first:last]
        values = self.table[torch.stack((codes >> 4, codes & 15), dim=-1).int()].view(last - first, -1, 64)
        return (values * self.constants[first:last, :, None]).view(last - first, *self.shape[1:]).to(dtype)


def through(stack: Any, routing: Routing, kind: torch.dtype = torch.float32) -> list[Tensor]:
    """A product with a stack, and the gradient of its rows."""
    width = stack.shape[2]
    rows = torch.randn(routing.rows, width, generator=torch.Generator().manual_seed(5)).to(kind).requires_grad_()
    found = GroupedLinear.apply(rows, stack, routing, kind)
    found.backward(torch.linspace(-1, 1, found.numel()).view_as(found).to(kind))
    return [found.detach(), rows.grad]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin stands in for the kernel."""
    monkeypatch.setattr(trial, "multiplies_experts", lambda device: True)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("how", ["random", "even", "skewed", "one token"])
def test_the_kernel_multiplies_where_it_runs_and_gives_what_chunks_give(how: str) -> None:
    routing, sorted_by_torch = Routing(routed(how), COUNT, True), Routing(routed(how), COUNT)
    assert all(
        torch.equal(one, vars(sorted_by_torch)[name]) for name, one in vars(routing).items() if name[-2:-1] == "_"
    )
    stack, plain = InFourBits((COUNT, 48, 64)), InFourBits((COUNT, 48, 64), IN_CHUNKS)
    assert isinstance(stack, PackedStack) and not isinstance(Counting(torch.empty(1, 1, 1)), PackedStack)
    for one, other in zip(through(stack, routing), through(plain, routing), strict=True):
        torch.testing.assert_close(one, other)
    assert (stack.reads, stack.unpacked) == (0, 2) and plain.reads >= 2 and plain.unpacked == 0


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("shape", "by", "dtype"),
    [
        ((COUNT, 48, 80), None, torch.float32),  # blocks run over the ends of rows
        ((COUNT, 24, 64), None, torch.float32),
        ((COUNT, 48, 64), IN_CHUNKS, torch.float32),  # as the run began
        ((COUNT, 48, 64), IN_TRITON, torch.bfloat16),  # of rows in float32
    ],
)
def test_what_the_kernel_does_not_fit_is_multiplied_in_chunks(
    shape: tuple[int, int, int], by: str | None, dtype: torch.dtype
) -> None:
    stack, routing = InFourBits(shape, by), Routing(routed("random"), COUNT)
    grouped(torch.randn(routing.rows, shape[2]), stack, routing, dtype)
    assert stack.reads > 0 and stack.unpacked == 0


def test_a_run_with_the_kernel_goes_on_in_chunks_where_there_is_none() -> None:
    stack, routing = InFourBits((COUNT, 48, 64), IN_TRITON), Routing(routed("random"), COUNT)
    through(stack, routing)
    assert stack.reads > 0 and stack.unpacked == 0


QWEN3_30B = ((128, 1536, 2048), (128, 2048, 768))  # gate and up, down, by its config.json
ROWS = 2048 * 8  # of 2,048 tokens


def on_meta(shape: tuple[int, int, int], nested: bool = True) -> Any:
    """A slab of NF4 as a model on meta has it."""
    from qlora.model.experts import Slab
    from qlora.recipe.sections import QuantizationSection

    slab = Slab(shape, QuantizationSection(double_quant=nested))
    slab.by = IN_TRITON
    slab.allocate(torch.device("meta"))
    return slab


@pytest.mark.parametrize("back", [False, True])
def test_sort_and_products_of_a_layer_of_qwen3_30b_are_five_launches(back: bool) -> None:
    """Forth or back: the sort, then constants in 32 bit and a product, of each projection; nothing is read on the host,
    for what is on meta has no numbers. With a floor: weights are read once, in 4 bit (of 1,536 x 2,048: 1.5 MiB)."""
    index_TK, slabs = torch.empty(2048, 8, dtype=torch.int64, device="meta"), [on_meta(shape) for shape in QWEN3_30B]
    with Counter() as counter:
        routing = Routing(index_TK, 128, has_kernel(slabs[0], index_TK))
        assert counter.launches == 1
        for shape, slab in zip(QWEN3_30B, slabs, strict=True):
            before = counter.cost
            rows = torch.empty(ROWS, shape[1 if back else 2], dtype=torch.bfloat16, device="meta")
            grouped(rows, slab, routing, torch.bfloat16, back)
            asked = counter.cost.less(before)
            values = math.prod(shape)
            constants = 4 * values // 64
            there = values // 2 + 2 * ROWS * (shape[1] + shape[2])  # codes, rows and results
            assert asked.launches == 2
            # Constants are written and read; beside them their own 8 bits, the nested ones, tables and ends.
            assert there + 2 * constants + values // 64 < asked.nbytes < 1.01 * (there + 2 * constants + values // 64)
    assert counter.launches == 5  # the issue allows 6
    assert "bounds" not in vars(routing)


def test_constants_of_a_layer_take_what_they_are_said_to() -> None:
    """24 MiB of Qwen3-30B's gate and up, for as long as its product runs, in place of 256 MiB of weights in 16 bit."""
    assert on_meta(QWEN3_30B[0]).packed().constants.nbytes == 24 << 20
    assert on_meta(QWEN3_30B[1]).packed().constants.nbytes == 12 << 20
    plain = on_meta(QWEN3_30B[0], nested=False)
    assert plain.packed().constants is plain.absmax


def test_all_that_experts_launch_is_counted() -> None:
    """Of a layer of Qwen3-30B, with its own activation: 11 launches forth (16 where torch sorts) and 14 back."""
    from transformers import CONFIG_MAPPING
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    with torch.device("meta"):
        module = Qwen3MoeExperts(CONFIG_MAPPING["qwen3_moe"](**sizes))
        hidden_TH = torch.empty(2048, 2048, dtype=torch.bfloat16, requires_grad=True)
        index_TK, weights_TK = torch.empty(2048, 8, dtype=torch.int64), torch.empty(2048, 8, dtype=torch.bfloat16)
    for name, shape in zip(("gate_up_proj", "down_proj"), QWEN3_30B, strict=True):
        del module._parameters[name]
        module.add_module(name, on_meta(shape))
    with Counter() as counter:
        output = experts_forward(lambda rows: rows.dtype, module, hidden_TH, index_TK, weights_TK.requires_grad_())
        forth = counter.launches
        output.backward(torch.empty_like(output))
    assert (forth, counter.launches - forth) == (11, 14)
