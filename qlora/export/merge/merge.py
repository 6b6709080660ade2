"""An adapter and its base become one set of weights, tensor by tensor.

    merged = W + scale · B A                     LoRA (Hu et al. 2021, eq. 3)
    merged = m · (W + scale · B A) / ‖·‖ by row  DoRA (Liu et al. 2024, eq. 5)

with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). An embedding's adapter is the same, transposed.

W is what the adapter was trained against: the base's weight as its NF4 code says it (`nf4`, rounded to bf16 as in the
training's forward pass), or the original weight (`full`). Sums are in fp32, rounded once. Nothing is loaded as a model:
weights are read from the base's shards in blocks of rows and handed on. What is held at a time is a block, and of a
weight in 4 bit its codes, a quarter of its 16-bit size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from qlora import __version__, disk
from qlora.errors import ExportError
from qlora.export.merge.parts import VALUES_PER_BLOCK, ParameterSource, Plan, is_multimodal, make_plan
from qlora.model import nf4
from qlora.model.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Adapter,
    LoraModule,
    TokenRows,
    read_adapter,
    scale_of,
)
from qlora.model.base_folder import BaseFolder
from qlora.model.meta_model import build
from qlora.model.tensors import read_tensor
from qlora.recipe.sections import QuantizationSection

__all__ = ["Adapter", "Merge", "MergeBase", "MergedTensor", "is_multimodal", "read_adapter", "scale_of"]

MergeBase = Literal["nf4", "full"]


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result.

    name       in the written checkpoint: the base's own; of a multimodal base, whose text part alone is merged, the
               causal model's
    parameter  in the causal (text) model, such as "model.layers.0.self_attn.q_proj.weight"
    blocks     `blocks(unit)` reads, merges and yields it when it is called: consecutive blocks of rows on the CPU, each
               a multiple of `unit` rows (the last one what is left); under two dimensions a tensor comes whole
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    blocks: Callable[[int], Iterator[Tensor]]


@dataclass(frozen=True)
class Merge:
    """A base with its adapter, ready to be merged into `dtype` (fp32, bf16 or fp16)."""

    base: BaseFolder
    adapter: Adapter
    merge_base: MergeBase
    quantization: QuantizationSection
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> list[MergedTensor]:
        """Every tensor of the merged model, in the order of the base's own. Raises ExportError when they don't match.

        A head that shares the embeddings' weight is not among them.
        """
        return [self._tensor(part, self.dtype) for part in self._plan.merged.values()]

    def base_tensors(self) -> list[MergedTensor]:
        """The base without the adapter, what training held in 4 bit dequantized where `merge_base` says so."""
        return [self._tensor(part, self.dtype) for part in self._plan.base.values()]

    @property
    def changed(self) -> tuple[str, ...]:
        """The parameters that the adapter changes, in the order of the base's tensors."""
        return tuple(name for name, part in self._plan.merged.items() if part != self._plan.base.get(name))

    @property
    def vocabulary_resized(self) -> bool:
        """Whether the merged model has another number of token rows than the base."""
        name = self._plan.embeddings
        return self._plan.merged[name].shape != self._plan.base[name].shape

    def expected_delta(self, parameter: str) -> float:
        """The Frobenius norm of merged minus base for one parameter, before rounding; 0 where nothing is merged.

        For LoRA it is scale · ‖B A‖, from the r × r products BᵀB and AAᵀ. What is replaced or scaled (DoRA, whole
        weights, token rows) is compared with the base in blocks; rows that the base lacks count in full.
        """
        part, before = self._plan.merged[parameter], self._plan.base.get(parameter)
        if part == before:
            return 0.0
        lora = part.lora
        if lora is not None and lora.magnitude is None and before == replace(part, lora=None):
            a_RI, b_OR = read_tensor(lora.a).double(), read_tensor(lora.b).double()
            return abs(lora.scale) * math.sqrt(max(0.0, float(((a_RI @ a_RI.T) * (b_OR.T @ b_OR)).sum())))
        squares = 0.0
        others = iter(()) if before is None else self._tensor(before, torch.float32).blocks(1)
        for block in self._tensor(part, torch.float32).blocks(1):
            other = next(others, block[:0])[: len(block)]
            squares += float((block[: len(other)] - other).double().square().sum())
            squares += float(block[len(other) :].double().square().sum())
        return math.sqrt(squares)

    def text_config(self) -> dict[str, Any]:
        """The merged model's configuration: the base's (of a multimodal one, its text model's) with what merging
        changes: the size of the vocabulary, head tied or not, no quantization. The dtype stands as the base says it.
        """
        config = _text_config(self.base) if is_multimodal(self.base) else dict(self.base.config)
        config.pop("quantization_config", None)
        if self.vocabulary_resized:
            config["vocab_size"] = self._plan.merged[self._plan.embeddings].shape[0]
        if self._plan.parted or (self._plan.own_head and config.get("tie_word_embeddings")):
            config["tie_word_embeddings"] = False
        return config

    def identity(self) -> dict[str, str]:
        """What the merged values depend on, for an export that goes on where a killed one stopped."""
        files = (self.adapter.folder / ADAPTER_FILE, self.adapter.folder / ADAPTER_CONFIG)
        return {
            "qlora": __version__,
            "adapter": disk.sha256_text(*(disk.sha256_file(file) for file in files)),
            "base": self.base.fingerprint,
            "merge_base": self.merge_base,
            "quantization": self.quantization.model_dump_json(),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    @cached_property
    def _plan(self) -> Plan:
        if self.merge_base == "full" and self.base.stored_4bit:
            raise ExportError(
                f"{self.base.name}: is stored in 4 bit, there are no original weights in it",
                "merge with --base nf4, or name the unquantized base",
            )
        return make_plan(self.base, self.adapter, self.merge_base == "nf4" and self.quantization.type != "none")

    def _tensor(self, part: ParameterSource, dtype: torch.dtype) -> MergedTensor:
        return MergedTensor(part.name, part.parameter, part.shape, lambda unit: self._blocks(part, dtype, unit))

    def _blocks(self, part: ParameterSource, dtype: torch.dtype, unit: int) -> Iterator[Tensor]:
        """Blocks of rows of one part, merged, in `dtype`, on the CPU."""
        add = _adder(part.lora, self.device, lambda: self._base_blocks(part, 1)) if part.lora else None
        start = 0
        for block in self._base_blocks(part, unit):
            if add is not None:
                block = add(block, start)
            if part.rows is not None:
                block = _with_rows(block, part.rows, start)
            start += block.shape[0] if block.ndim else 1
            yield block.to(dtype=dtype).cpu()

    def _base_blocks(self, part: ParameterSource, unit: int) -> Iterator[Tensor]:
        """What the adapter is added to: as it is stored, or bf16 where it comes from 4 bit."""
        if len(part.shape) < 2:
            yield read_tensor(part.entry)
            return
        read: Callable[[int, int], Tensor] = lambda start, end: read_tensor(part.entry, (start, end))  # noqa: E731
        rows, columns = part.shape[0], math.prod(part.shape[1:])
        if part.held != "plain":
            quantized = self._quantized(part)
            read, unit = nf4.row_reader(quantized, torch.bfloat16), math.lcm(unit, nf4.row_unit(quantized))
        step = max(1, VALUES_PER_BLOCK // max(1, unit * columns)) * unit
        for start in range(0, rows, step):
            yield read(start, min(rows, start + step))

    def _quantized(self, part: ParameterSource) -> nf4.Quantized:
        """The weight in 4 bit, as loading it for training makes it: from bf16 rows, statistics over the whole."""
        if part.held == "packed":
            return nf4.stored_4bit(self.base, part.source, self.device)
        held, entry = self.quantization, part.entry
        return nf4.quantize_rows(
            lambda start, end: read_tensor(entry, (start, end)).to(torch.bfloat16),
            part.shape,
            held.type,
            held.double_quant,
            self.device,
            VALUES_PER_BLOCK,
        )


def _text_config(base: BaseFolder) -> dict[str, Any]:
    """The config of a multimodal base's text model: its own section, with what the whole says for all parts."""
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
    whole = {key: base.config[key] for key in shared if key in base.config}
    return {**whole, **base.config["text_config"], "architectures": [type(build(base).model).__name__]}


# --- arithmetic on blocks of rows -------------------------------------------------------------------------------------


def _adder(
    lora: LoraModule, device: torch.device, base_blocks: Callable[[], Iterator[Tensor]]
) -> Callable[[Tensor, int], Tensor]:
    """A function from a block of the base's rows and the number of its first to the merged rows, fp32, on `device`."""
    a = read_tensor(lora.a).to(device, torch.float32)
    b = read_tensor(lora.b).to(device, torch.float32)
    left, right = (a.T, b.T) if lora.embedding else (b, a)

    def add(block: Tensor, start: int) -> Tensor:
        rows = block.to(device, torch.float32)  # in memory of its own, as everything that was read is
        return rows.addmm_(left[start : start + len(rows)], right, alpha=lora.scale)

    if lora.magnitude is None:
        return add
    magnitude = read_tensor(lora.magnitude).to(device, torch.float32).view(-1)
    if not lora.embedding:

        def scale_rows(block: Tensor, start: int) -> Tensor:
            merged = add(block, start)
            return merged.mul_((magnitude[start : start + len(merged)] / merged.norm(dim=1)).unsqueeze(1))

        return scale_rows
    # An embedding's magnitudes belong to its columns, whose norms go over all tokens: a pass of its own.
    squares, start = torch.zeros(len(magnitude), dtype=torch.float64, device=device), 0
    for block in base_blocks():
        squares += add(block, start).double().square().sum(dim=0)
        start += len(block)
    factors = (magnitude / squares.sqrt()).to(torch.float32)
    return lambda block, start: add(block, start).mul_(factors)


def _with_rows(block: Tensor, rows: TokenRows, start: int) -> Tensor:
    """A block from row `start` on, in which the trained token rows take the place of the base's."""
    here = [number for number, token in enumerate(rows.ids) if start <= token < start + len(block)]
    if here:
        block = block.to(torch.float32, copy=True)
        places = torch.tensor([rows.ids[number] - start for number in here])
        block[places.to(block.device)] = read_tensor(rows.values)[here].to(block)
    return block
