"""An adapter and its base become one set of weights, tensor by tensor.

    merged = W + scale · B A                     LoRA (Hu et al. 2021, eq. 3)
    merged = m · (W + scale · B A) / ‖·‖ by row  DoRA (Liu et al. 2024, eq. 5)

with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). An embedding's adapter is the same, transposed.

W is what the adapter was trained against: the base's weight as its NF4 code says it (`nf4`, rounded to bf16 as in the
training's forward pass), or the original weight (`full`). Sums are in fp32, rounded once. Nothing is loaded as a model:
weights are read from the base's shards in blocks of rows and handed on. In memory at a time are a block, what is read
ahead of it (`tensors.AHEAD_BYTES`), and of a weight in 4 bit its codes, a quarter of its 16-bit size; where they come
from the cache, those of its layer (0.1 GB of an 8B model, 0.45 of one of 70B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora import disk
from qlora.export.merge.experts import Reading, merged_blocks
from qlora.export.merge.parts import VALUES_PER_BLOCK, MergeBase, ParameterSource, Plan, is_multimodal
from qlora.model import mxfp4, nf4
from qlora.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_FILE, Adapter, LoraModule, TokenRows
from qlora.model.base_folder import BaseFolder
from qlora.model.tensors import TensorEntry, read_ahead, read_tensor
from qlora.recipe.sections import QuantizationSection
from qlora.version import __version__

# What a multimodal base's config says for all its parts, its text model among them.
_OF_ALL_PARTS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result.

    name       in the written checkpoint: the base's own; of a multimodal base, whose text part alone is merged, the
               causal model's
    parameter  in the causal (text) model, such as "model.layers.0.self_attn.q_proj.weight"
    blocks     `blocks(unit)` reads, merges and yields it when it is called: consecutive blocks of rows on the CPU, each
               a multiple of `unit` rows (the last one what is left); under two dimensions a tensor comes whole
    dtype      of the blocks: the merge's, fp32 where the model computes with it in fp32 whatever its type, or uint8 of
               experts in MXFP4
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    blocks: Callable[[int], Generator[Tensor, None, None]]
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Merge:
    """A base with its adapter, planned by `make_plan`, ready to be merged into `dtype` (fp32, bf16 or fp16).

    `codes` gives a parameter of the base in 4 bit as it is kept already, or None; `watch`, what sees all rows of a
    tensor of the base as it is read, or None; `reading` is what is kept meanwhile.
    """

    base: BaseFolder
    adapter: Adapter
    merge_base: MergeBase
    quantization: QuantizationSection
    device: torch.device
    plan: Plan
    dtype: torch.dtype = torch.bfloat16
    codes: Callable[[str], nf4.Quantized | None] = lambda parameter: None
    watch: Callable[[str, TensorEntry], Callable[[Tensor], None] | None] = lambda tensor, entry: None
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    def tensors(self) -> list[MergedTensor]:
        """Every tensor of the merged model, in the order of the base's own.

        A head that shares the embeddings' weight is not among them.
        """
        return [self._tensor(source) for source in self.plan.merged.values()]

    def base_tensors(self) -> list[MergedTensor]:
        """The base without the adapter, what training had in 4 bit dequantized where `merge_base` is nf4."""
        return [self._tensor(source) for source in self.plan.base.values()]

    @property
    def changed(self) -> tuple[str, ...]:
        """The parameters that the adapter changes, in the order of the base's tensors."""
        return tuple(name for name, source in self.plan.merged.items() if source != self.plan.base.get(name))

    @property
    def vocabulary_resized(self) -> bool:
        """Whether the merged model has another number of token rows than the base."""
        name = self.plan.embeddings
        return self.plan.merged[name].shape != self.plan.base[name].shape

    def text_config(self) -> dict[str, Any]:
        """The merged model's configuration: the base's (of a multimodal one, its text model's) with what merging
        changes: the size of the vocabulary, head tied or not, no quantization but that of experts in MXFP4. The dtype
        stands as the base says it.
        """
        config = dict(self.base.config)
        if is_multimodal(self.base):
            whole = {key: config[key] for key in _OF_ALL_PARTS if key in config}
            config = {**whole, **config["text_config"], "architectures": [self.plan.architecture]}
        if not self.plan.in_mxfp4:
            config.pop("quantization_config", None)
        if self.vocabulary_resized:
            config["vocab_size"] = self.plan.merged[self.plan.embeddings].shape[0]
        if self.plan.parted or (self.plan.own_head and config.get("tie_word_embeddings")):
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

    def _tensor(self, source: ParameterSource) -> MergedTensor:
        blocks = partial(self._blocks, source)
        return MergedTensor(source.name, source.parameter, source.shape, blocks, self._dtype(source))

    def _dtype(self, source: ParameterSource) -> torch.dtype:
        if source.as_bytes:
            return torch.uint8
        return torch.float32 if source.in_fp32 else self.dtype

    def _blocks(self, source: ParameterSource, unit: int) -> Generator[Tensor, None, None]:
        """Blocks of rows of one parameter, merged, on the CPU."""
        if source.expert is not None:
            watched = partial(self.watch, source.tensor)
            for block in merged_blocks(source.expert, unit, self.device, self.reading, watched):
                yield block.to(dtype=self._dtype(source)).cpu()
            return
        add = _adder(source.lora, self.device, lambda: self._base_blocks(source, 1)) if source.lora else None
        start = 0
        for block in self._base_blocks(source, unit):
            if add is not None:
                block = add(block, start)
            if source.rows is not None:
                block = _with_rows(block, source.rows, start)
            start += block.shape[0] if block.ndim else 1
            yield block.to(dtype=self._dtype(source)).cpu()

    def _base_blocks(self, source: ParameterSource, unit: int) -> Iterator[Tensor]:
        """What the adapter is added to: as it is stored, or bf16 where it comes from 4 bit."""
        if len(source.shape) < 2:
            whole = read_tensor(source.entry)
            if (see := self.watch(source.tensor, source.entry)) is not None:
                see(whole)
            yield whole
            return
        if source.storage == "mxfp4":
            yield from self._experts(source)
            return
        rows, columns = source.shape[0], math.prod(source.shape[1:])
        read = None
        if source.storage != "plain":
            quantized = self._quantized(source)
            read, unit = nf4.row_reader(quantized, torch.bfloat16), math.lcm(unit, nf4.row_unit(quantized))
        spans = _spans(rows, max(1, VALUES_PER_BLOCK // max(1, unit * columns)) * unit)
        yield from self._read_ahead(source, spans) if read is None else (read(*span) for span in spans)

    def _read_ahead(self, source: ParameterSource, spans: list[tuple[int, int]]) -> Generator[Tensor, None, None]:
        return read_ahead(source.entry, spans, self.watch(source.tensor, source.entry), self.reading.cache)

    def _experts(self, source: ParameterSource) -> Iterator[Tensor]:
        """Experts in MXFP4 in bf16, one after the other, with the sides that their parameter has: (1, in, out)."""
        assert source.scales is not None
        for span in _spans(source.shape[0], 1):
            matrix = mxfp4.decoded(read_tensor(source.entry, span), read_tensor(source.scales, span), torch.bfloat16)
            yield matrix.transpose(1, 2).contiguous()

    def _quantized(self, source: ParameterSource) -> nf4.Quantized:
        """The weight in 4 bit, as loading it for training makes it: from bf16 rows, statistics over the whole."""
        if source.storage == "packed":
            return nf4.stored_4bit(self.base, source.tensor, self.device)
        if (kept := self.codes(source.parameter)) is not None:
            return kept
        rows, columns = source.shape[0], math.prod(source.shape[1:])
        blocks = self._read_ahead(source, _spans(rows, nf4.rows_in_block(columns, VALUES_PER_BLOCK)))
        with closing(blocks):
            return nf4.quantize_rows(
                lambda start, end: next(blocks).to(torch.bfloat16),  # it asks for the same rows, in order
                source.shape,
                self.quantization.type,
                self.quantization.double_quant,
                self.device,
                VALUES_PER_BLOCK,
            )


def _spans(rows: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


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
