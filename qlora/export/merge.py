"""An adapter and its base become one set of weights, tensor by tensor.

    merged = W + scale · B A                     LoRA (Hu et al. 2021, eq. 3)
    merged = m · (W + scale · B A) / ‖·‖ by row  DoRA (Liu et al. 2024, eq. 5)

with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).

W is what the adapter was trained against: the base's weight as its NF4 code says it (`nf4`, rounded to bf16 as in the
training's forward pass), or the original weight (`full`). Sums are in fp32, rounded once. Nothing is loaded as a model:
weights are read from the base's shards in blocks of rows and handed on, so that memory is bounded by one tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.errors import ExportError
from qlora.model import nf4
from qlora.model.blueprint import Blueprint, draw, is_stored_4bit, linear_layers
from qlora.model.hub import BaseFolder
from qlora.model.load import stored_4bit
from qlora.model.tensors import TensorEntry, read_header, read_tensor
from qlora.recipe import QuantizationSection

MergeBase = Literal["nf4", "full"]
PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VALUES_PER_BLOCK = 1 << 23  # 32 MiB of fp32 in flight

# adapter_config.json keys that change the arithmetic in ways that a plain merge cannot express.
UNMERGEABLE = {
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained token rows",
    "megatron_config": "Megatron layers",
    "alora_invocation_tokens": "adapters that switch on in mid-text (aLoRA)",
    "use_qalora": "QALoRA",
    "lora_bias": "biases in the adapter",
}


@dataclass(frozen=True)
class LoraModule:
    """The trained matrices of one module: A (r, in), B (out, r), DoRA's magnitude (out,) or None."""

    a: TensorEntry
    b: TensorEntry
    magnitude: TensorEntry | None
    scale: float
    transposed: bool  # the base keeps this weight as (in, out)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, checked, nothing read yet but its header. Keys are parameter names of the base."""

    folder: Path
    config: Mapping[str, Any]
    lora: Mapping[str, LoraModule]
    whole: Mapping[str, TensorEntry]  # modules_to_save


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter folder in PEFT's layout. Raises ExportError for what is none or cannot be merged."""
    config_file, file = folder / ADAPTER_CONFIG, folder / ADAPTER_FILE
    if not config_file.is_file():
        raise ExportError(f"{folder}: no {ADAPTER_CONFIG}", "name a run's folder or a PEFT adapter folder")
    if not file.is_file():
        raise ExportError(f"{folder}: no {ADAPTER_FILE}", "adapters are read as safetensors only: save it as such")
    config = _read_config(config_file)
    for key, what in UNMERGEABLE.items():
        if config.get(key):
            raise ExportError(f"{config_file}: {what} ({key}) cannot be merged", "use this adapter through peft")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        kind = f"{config.get('peft_type')} with bias {config.get('bias', 'none')!r}"
        raise ExportError(f"{config_file}: {kind} cannot be merged", "LORA adapters without bias can")
    tensors = {name.removeprefix(PREFIX): entry for name, entry in read_header(file).items()}
    return Adapter(folder, config, *_sort_tensors(tensors, config, file))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return dict(config)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{file}: cannot be read ({error})", "save the adapter again") from error


def _sort_tensors(
    tensors: dict[str, TensorEntry], config: Mapping[str, Any], file: Path
) -> tuple[dict[str, LoraModule], dict[str, TensorEntry]]:
    lora: dict[str, LoraModule] = {}
    whole: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        module, _, part = name.partition(".lora_")
        if not part:
            whole[name] = entry
        elif part.startswith("embedding_"):
            raise ExportError(f"{file}: {module} is an adapter on an embedding", "use this adapter through peft")
        elif part == "A.weight":
            other = tensors.get(f"{module}.lora_B.weight")
            if other is None or other.shape[1] != entry.shape[0]:
                raise ExportError(f"{file}: {module} has no matching lora_B", "save the adapter again")
            lora[f"{module}.weight"] = LoraModule(
                a=entry,
                b=other,
                magnitude=tensors.get(f"{module}.lora_magnitude_vector"),
                scale=scale_of(module, config, entry.shape[0], file),
                transposed=bool(config.get("fan_in_fan_out")),
            )
    if config.get("use_dora") and any(module.magnitude is None for module in lora.values()):
        raise ExportError(f"{file}: use_dora is set but magnitudes are missing", "save the adapter again")
    return lora, whole


def scale_of(module: str, config: Mapping[str, Any], rank: int, file: Path) -> float:
    """alpha / r, or alpha / sqrt(r) under rsLoRA, with the module's own alpha and rank where patterns name it."""
    own_rank = _pattern(module, config.get("rank_pattern") or {}, config.get("r"))
    alpha = _pattern(module, config.get("alpha_pattern") or {}, config.get("lora_alpha"))
    if own_rank != rank:
        raise ExportError(
            f"{file}: {module} has rank {rank}, adapter_config.json says {own_rank}", "save the adapter again"
        )
    return float(alpha / rank**0.5) if config.get("use_rslora") else float(alpha / rank)


def _pattern(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """A pattern is a regular expression for the end of a module's name, as peft reads it (get_pattern_key)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result. `blocks` reads, merges and yields it in blocks of rows, when it is called."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Merge:
    """A base with its adapter, ready to be merged into `dtype`."""

    base: BaseFolder
    adapter: Adapter
    merge_base: MergeBase
    quantization: QuantizationSection
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def tensors(self) -> list[MergedTensor]:
        """Every tensor of the merged model, in the order of the base's own. Raises ExportError when they don't match.

        Names are those of the base's checkpoint; of a multimodal one, whose text part alone is merged, the model's.
        """
        blueprint = draw(self.base)
        shapes = {name: tuple(tensor.shape) for name, tensor in blueprint.model.state_dict().items()}
        self._check(blueprint, shapes)
        in_4bit = {f"{name}.weight" for name, _ in linear_layers(blueprint.model)}
        merged = []
        for name, source in blueprint.sources.items():
            blocks = self._producer(name, source, shapes[name], name in in_4bit)
            merged.append(MergedTensor(name if is_multimodal(self.base) else source, shapes[name], blocks))
        return merged

    def _check(self, blueprint: Blueprint, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every trained tensor has its place in the base, in the right shape, and something was trained at all."""
        folder, hint = self.adapter.folder, "name the base it was trained on (adapter_config.json tells which)"
        if not self.adapter.lora and not self.adapter.whole:
            raise ExportError(f"{folder}: nothing to merge, the adapter holds no tensors", "train it first")
        if self.merge_base == "full" and self.base.stored_4bit:
            raise ExportError(
                f"{self.base.name}: is stored in 4 bit, there are no original weights in it",
                "merge with --base nf4, or name the unquantized base",
            )
        wanted = {name: (m.b.shape[0], m.a.shape[1]) for name, m in self.adapter.lora.items()}
        wanted = {name: shape[::-1] if self.adapter.lora[name].transposed else shape for name, shape in wanted.items()}
        for name, shape in {**wanted, **{name: entry.shape for name, entry in self.adapter.whole.items()}}.items():
            if name not in blueprint.sources:
                raise ExportError(f"{folder}: {name} is not in the base {self.base.name}", hint)
            if shapes[name] != shape:
                raise ExportError(f"{folder}: {name} is {shape} here and {shapes[name]} in {self.base.name}", hint)
        moved = any(bool(read_tensor(module.b).any()) for module in self.adapter.lora.values())
        if not moved and not self.adapter.whole:
            raise ExportError(f"{folder}: nothing to merge, every lora_B is zero", "train it first")

    def _producer(
        self, name: str, source: str, shape: tuple[int, ...], quantized: bool
    ) -> Callable[[], Iterator[Tensor]]:
        if name in self.adapter.whole:
            return lambda: self._plain_blocks(self.adapter.whole[name])
        module = self.adapter.lora.get(name)
        if is_stored_4bit(self.base, source) or (quantized and self._trained_in_4bit):
            return lambda: self._with_adapter(self._dequantized_blocks(source, shape), module)
        return lambda: self._with_adapter(self._plain_blocks(self.base.tensors[source]), module)

    @property
    def _trained_in_4bit(self) -> bool:
        # A base stored in 4 bit keeps some layers in 16 bit on purpose: those are never quantized.
        return self.merge_base == "nf4" and self.quantization.type != "none" and not self.base.stored_4bit

    def _plain_blocks(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Rows as they are stored; a tensor without rows (a scalar) whole."""
        if not entry.shape:
            yield read_tensor(entry)
            return
        step = nf4.rows_in_block(max(1, entry.numel // max(1, entry.shape[0])), VALUES_PER_BLOCK)
        for start in range(0, entry.shape[0], step):
            yield read_tensor(entry, (start, min(start + step, entry.shape[0])))

    def _dequantized_blocks(self, source: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        weight = nf4.dequantize(self._quantized(source, shape), torch.bfloat16)
        step = nf4.rows_in_block(shape[1], VALUES_PER_BLOCK)
        for start in range(0, shape[0], step):
            yield weight[start : start + step]

    def _quantized(self, source: str, shape: tuple[int, ...]) -> nf4.Quantized:
        """The weight in 4 bit, as loading it for training makes it: from bf16 rows, statistics over the whole."""
        if is_stored_4bit(self.base, source):
            return stored_4bit(self.base, source, self.device)
        entry = self.base.tensors[source]
        held = self.quantization
        return nf4.quantize_rows(
            lambda start, end: read_tensor(entry, (start, end)).to(torch.bfloat16),
            shape,
            held.type,
            held.double_quant,
            self.device,
        )

    def _with_adapter(self, blocks: Iterator[Tensor], module: LoraModule | None) -> Iterator[Tensor]:
        """Add the trained product to blocks of rows and round them to the result's dtype."""
        if module is None:
            for block in blocks:
                yield block.to(self.dtype)
            return
        a_RI = read_tensor(module.a).to(self.device, torch.float32)
        b_OR = read_tensor(module.b).to(self.device, torch.float32)
        magnitude = None if module.magnitude is None else read_tensor(module.magnitude).to(self.device, torch.float32)
        start = 0
        for block in blocks:
            end = start + block.shape[0]
            yield _merged_rows(block.to(self.device), (start, end), (a_RI, b_OR), magnitude, module).to(self.dtype)
            start = end


def _merged_rows(
    rows: Tensor,
    span: tuple[int, int],
    factors: tuple[Tensor, Tensor],
    magnitude: Tensor | None,
    module: LoraModule,
) -> Tensor:
    """Rows `span` of the merged weight, fp32."""
    a_RI, b_OR = factors
    start, end = span
    if module.transposed:
        return rows.float() + module.scale * (a_RI[:, start:end].T @ b_OR.T)
    merged = rows.float() + module.scale * (b_OR[start:end] @ a_RI)
    if magnitude is not None:
        merged *= (magnitude[start:end] / merged.norm(dim=1)).unsqueeze(1)
    return merged


def is_multimodal(base: BaseFolder) -> bool:
    """Whether the base's text model is a part of it, so that the merged model has another config and other names."""
    return isinstance(base.config.get("text_config"), Mapping)
