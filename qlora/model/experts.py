"""Experts in 4 bit: each expert of a projection is a 2-D weight, quantized by itself, bit for bit as `nf4`.

transformers keeps the experts of a layer in one 3-D parameter, which bitsandbytes' layers never see. Here a `Slab`
takes its place: codes, block constants and nested constants of all experts, each expert's apart (4.127 bit a value from
16,384 values an expert on), so that any range of them is read by three kernels. All of it are buffers: what moves,
streams, counts or empties a layer's tensors finds them like any other.

Always (E, out, in), blocks of 64 running over the flattened expert. Where an expert's values are no multiple of 64 the
projection stays in 16 bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora import numerics
from qlora.events import Notice
from qlora.model import mxfp4_config
from qlora.model.cpu_matmul import product_dtype
from qlora.model.mixtures import experts_in, routers_in, speaks_of_experts
from qlora.model.mxfp4 import Mxfp4Stack
from qlora.model.nf4 import BLOCK, NESTED_BLOCK, Quantized, quantize_rows
from qlora.numerics import Numerics
from qlora.step import experts as step_experts
from qlora.step.kernels import experts as kernels
from qlora.step.kernels import trial
from qlora.third_party import import_bitsandbytes

if TYPE_CHECKING:
    from qlora.recipe.sections import QuantizationSection


class Slab(nn.Module):
    """The experts of one projection in 4 bit.

    codes         (E, out * in / 2) uint8, two values a byte
    absmax        (E, blocks) fp32; with double quantization uint8, rounded up to whole nested blocks
    nested_absmax (E, blocks / 256) fp32, `offset` (E,) fp32: of double quantization alone
    table, nested_table: what codes mean
    """

    IN_BLOB = ("codes", "absmax", "nested_absmax", "offset")  # what a streamed layer's blob holds (`layer_blobs`)
    TABLES = ("table", "nested_table")  # of all experts, and small: they stay where they are computed with

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    table: Tensor
    nested_table: Tensor
    block = BLOCK

    def __init__(self, shape: tuple[int, int, int], quantization: QuantizationSection) -> None:
        super().__init__()
        self.shape, self.by = shape, of_run()
        self.quant_type, self.nested = quantization.type, quantization.double_quant
        count, values = shape[0], math.prod(shape[1:])
        assert values % BLOCK == 0, "blocks that run from expert to expert"
        self.blocks = values // BLOCK
        nested = -(-self.blocks // NESTED_BLOCK)
        meta = torch.device("meta")
        sizes = {"codes": ((count, values // 2), torch.uint8), "table": ((16,), torch.float32)}
        if self.nested:
            sizes["absmax"] = (count, nested * NESTED_BLOCK), torch.uint8
            sizes |= {"nested_absmax": ((count, nested), torch.float32), "offset": ((count,), torch.float32)}
            sizes["nested_table"] = (256,), torch.float32
        else:
            sizes["absmax"] = (count, self.blocks), torch.float32
        self.sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = sizes
        for name, (size, dtype) in sizes.items():  # of no bytes, also to who counts storages on meta
            self.register_buffer(name, torch.empty((), dtype=dtype, device=meta).expand(size), persistent=False)

    @property
    def nbytes(self) -> int:
        """Of all its buffers, wherever they are."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.sizes.values())

    def allocate(self, device: torch.device) -> None:
        """Room for all experts on `device`, without values."""
        for name, (size, dtype) in self.sizes.items():
            self._buffers[name] = torch.zeros(size, dtype=dtype, device=device)

    def take(self, buffers: Mapping[str, Tensor]) -> None:
        """Have these as they are, such as a kept base has them."""
        self._buffers.update(buffers)

    def put(self, expert: int, quantized: Quantized) -> None:
        """Give an expert its weight, as `quantize_rows` made it of (out, in)."""
        state = quantized.state
        assert tuple(state.shape) == self.shape[1:], "an expert of another shape"
        self.codes[expert] = quantized.data.view(-1)
        self.absmax[expert, : self.blocks] = state.absmax
        self.table.copy_(state.code)
        if self.nested:
            self.nested_absmax[expert] = state.state2.absmax
            self.nested_table.copy_(state.state2.code)
            self.offset[expert] = state.offset

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Experts `first` up to `last` (not included), (n, out, in): code times constant, in fp32, rounded once."""
        ops, count = torch.ops.bitsandbytes, last - first
        absmax = self.absmax[first:last]
        if self.nested:
            nested = (self.nested_absmax[first:last].reshape(-1), self.nested_table, NESTED_BLOCK, torch.float32)
            absmax = ops.dequantize_blockwise.default(absmax.reshape(-1), *nested).view(count, -1)
            absmax = absmax[:, : self.blocks] + self.offset[first:last, None]
        # As rows of one block each: blocks run over the expert laid out flat.
        shape = (count * self.blocks, BLOCK)
        codes = self.codes[first:last].reshape(-1, 1)
        weights: Tensor = ops.dequantize_4bit.default(codes, absmax.reshape(-1), BLOCK, self.quant_type, shape, dtype)
        return weights.view(count, *self.shape[1:])

    def read_rows(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of a slab of one expert, (end - start, in), as `read` gives them; the blocks that they lie in alone."""
        assert self.shape[0] == 1, "rows of several experts"
        width = self.shape[2]
        first, last = start * width // BLOCK, -(-end * width // BLOCK)
        ops, absmax = torch.ops.bitsandbytes, self.absmax[0]
        if self.nested:
            nested = (self.nested_absmax[0], self.nested_table, NESTED_BLOCK, torch.float32)
            absmax = ops.dequantize_blockwise.default(absmax, *nested)[: self.blocks] + self.offset
        codes = self.codes[0, first * BLOCK // 2 : last * BLOCK // 2, None]
        how = (BLOCK, self.quant_type, (last - first, BLOCK), dtype)
        weights: Tensor = ops.dequantize_4bit.default(codes, absmax[first:last], *how)
        begin = start * width - first * BLOCK
        return weights.view(-1)[begin : begin + (end - start) * width].view(-1, width)

    def packed(self) -> step_experts.Packed:
        """All experts as the kernel decodes them; their constants in 32 bit (Qwen3-30B: 24 MiB) while it runs."""
        constants = self.absmax
        if self.nested:
            about = (self.nested_absmax, self.nested_table, self.offset, self.blocks)
            constants = kernels.unnest(self.absmax, *about)
        return step_experts.Packed(self.codes, constants, self.table, True)


def choose(config: Any, device: torch.device, recorded: Numerics | None) -> str | None:
    """Who multiplies with experts in a run: a run that goes on, as it began (`recorded`; older versions knew chunks
    alone), where this device can. None for a model without experts."""
    if not speaks_of_experts(config):
        return None
    before = None if recorded is None else recorded.experts or step_experts.IN_CHUNKS
    if before == step_experts.IN_CHUNKS or not trial.multiplies_experts(device):
        return step_experts.IN_CHUNKS
    return step_experts.IN_TRITON


def of_run() -> str | None:
    """As the run under way has it; outside of one the kernel, wherever it runs."""
    run = numerics.of_run()
    return (run.experts or step_experts.IN_CHUNKS) if run else None


def compute_by(model: nn.Module, by: str | None) -> None:
    """Who is to multiply with the experts of a model that are held in 4 bit."""
    for module in model.modules():
        if isinstance(module, step_experts.PackedStack):
            module.by = by


def register() -> None:
    """Make our function of experts known to transformers, and bitsandbytes' operators to torch."""
    import_bitsandbytes()
    step_experts.register(product_dtype)


def projections(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """The projections of a model's experts, plain or held: each one's full name, its module, and its name there."""
    for owner, module in experts_in(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 3:
                yield f"{owner}.{name}", module, name
        for name, child in module.named_children():
            if isinstance(child, Slab | Mxfp4Stack):
                yield f"{owner}.{name}", module, name


def hold(model: Any, quantization: QuantizationSection) -> None:
    """Put slabs, still without weights, in the places of the experts' 3-D parameters, as far as blocks fit in them.

    What config.json says to be in MXFP4 stays in that, whatever `quantization` says of the rest.
    """
    for name, module, leaf in list(projections(model)):
        shape = step_experts.Plain(module, leaf).shape
        if mxfp4_config.holds(model.config, name.rpartition(".")[0]):
            stack: nn.Module = Mxfp4Stack(shape, of_run())
        elif quantization.type == "none" or shape[1] * shape[2] % BLOCK:
            continue
        else:
            stack = Slab(shape, quantization)
        del module._parameters[leaf]
        module.add_module(leaf, stack)


def keep_routing_still(model: nn.Module) -> None:
    """Have a model's routers choose in training as they do in evaluation.

    Some draw random numbers there, to be trained better (Phi-3.5-MoE samples its experts, Mixtral's and MiniMax' may
    be given noise). Here they are frozen, and a layer that is computed again in the backward pass must choose the same.
    Only what surrounds experts is meant, not a whole layer, which recomputes nothing outside of training.
    """
    owners = {model.get_submodule(name.rpartition(".")[0]) for name, _ in experts_in(model)}
    blocks = [one for one in owners if not hasattr(one, "gradient_checkpointing")]
    for block in (*blocks, *(model.get_submodule(name) for name in routers_in(model))):
        block.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False


def notices(model: nn.Module, quantization: QuantizationSection) -> Iterator[Notice]:
    """What a reader of the recipe must know of how a model's experts are held."""
    found = [(module, leaf) for _, module, leaf in projections(model)]
    if not found:
        return
    held = [(id(module), getattr(module, leaf)) for module, leaf in found]
    count = max(one.shape[0] for _, one in held)
    for kind, how in (
        (Slab, "are held in 4 bit ({size}); routers stay in 16"),
        (Mxfp4Stack, "stay in MXFP4 as published ({size}, 4.25 bit), not rounded again; attention is in {rest}"),
    ):
        if stacks := [(owner, one) for owner, one in held if isinstance(one, kind)]:
            size = f"{sum(one.nbytes for _, one in stacks) / 2**30:.2f} GiB"
            rest = "16 bit" if quantization.type == "none" else quantization.type.upper()
            layers = len({owner for owner, _ in stacks})
            message = f"{count} experts in each of {layers} layers {how.format(size=size, rest=rest)}"
            yield Notice("quantization", message, len(stacks))
    if unfit := sum(_is_unfit(one) for _, one in held):
        message = "projections of experts whose sides the kernel does not fit, multiplied in more memory and time"
        yield Notice("quantization", message, unfit)
    odd = sum(isinstance(one, Tensor) for _, one in held)
    if quantization.type != "none" and odd:
        message = (
            f"projections of experts that stay in 16 bit: {odd}, whose values are no multiple of {BLOCK} an expert"
        )
        yield Notice("quantization", message, odd)


def _is_unfit(stack: Any) -> bool:
    """Whether a run by the kernel multiplies with a stack in chunks."""
    packed = isinstance(stack, step_experts.PackedStack) and stack.by == step_experts.IN_TRITON
    return packed and not kernels.fits(stack.shape, stack.block)


def fill(slab: Slab, read_rows: Callable[[int], Callable[[int, int], Tensor]], device: torch.device) -> None:
    """Quantize the experts one after the other; `read_rows(expert)` gives rows of one of them, (end - start, in).

    On meta, where each takes the same, the first alone.
    """
    slab.allocate(device)
    for expert in range(1 if device.type == "meta" else slab.shape[0]):
        slab.put(expert, quantize_rows(read_rows(expert), slab.shape[1:], slab.quant_type, slab.nested, device))
