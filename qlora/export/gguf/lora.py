"""The adapter alone as GGUF, for llama.cpp's --lora and Ollama's ADAPTER: the base stays the file that it is.

Layout (llama.cpp, convert_lora_to_gguf.py and llama-adapter.cpp): `<name>.lora_a` (r, in) and `<name>.lora_b` (out, r)
in float32, and one `adapter.lora.alpha` for all; llama.cpp scales a product by alpha / r. What is scaled otherwise
(rsLoRA, ranks and alphas by pattern) is folded into B, and so is what happens to a weight's rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch
from torch import Tensor

from qlora.errors import ExportError
from qlora.export.gguf.architectures import Layout
from qlora.export.gguf.metadata import About, entries, general_keys, header, padded
from qlora.export.gguf.rope import Key
from qlora.export.staging import StagedExport
from qlora.model.adapter_folder import Adapter, LoraModule
from qlora.model.tensors import read_tensor

F32 = gguf.GGMLQuantizationType.F32


def check(adapter: Adapter) -> None:
    """Raises ExportError for adapters that are more than products of two matrices."""
    hint = "merge it instead: to='gguf'"
    if any(module.magnitude is not None for module in adapter.lora.values()):
        raise ExportError(f"{adapter.folder}: DoRA's magnitudes cannot stand in an adapter file", hint)
    if experts := sorted(adapter.experts):
        raise ExportError(f"{adapter.folder}: {experts[0]} has adapters on experts, which no adapter file holds", hint)
    if whole := sorted({*adapter.whole, *adapter.rows}):
        raise ExportError(f"{adapter.folder}: {whole[0]} was trained whole, which an adapter file cannot hold", hint)
    if embeddings := sorted(name for name, module in adapter.lora.items() if module.embedding):
        raise ExportError(f"{adapter.folder}: {embeddings[0]} has an adapter on an embedding", hint)


def check_layout(adapter: Adapter, layout: Layout) -> None:
    """Raises ExportError where llama.cpp would not look for the adapter of a weight that this one has."""
    for tensor in layout.tensors:
        adapted = tensor.parameter in adapter.lora or tensor.projection in adapter.lora
        if adapted and not (tensor.adapts and len(tensor.stored) == 2):
            what = f"{adapter.folder}: llama.cpp computes with {tensor.name} without a look for an adapter"
            raise ExportError(what, "merge it instead: to='gguf'")
    placed = {tensor.parameter for tensor in layout.tensors}
    if lost := sorted(adapter.lora.keys() - placed):
        what = f"{adapter.folder}: {lost[0]} has an adapter and no place of its own in a GGUF file"
        raise ExportError(what, "merge it instead: to='gguf'")


def planned_bytes(adapter: Adapter, layout: Layout) -> int:
    held = [module for tensor in layout.tensors if (module := adapter.lora.get(tensor.parameter))]
    return 4 * sum(module.a.numel + module.b.numel for module in held)


def write(adapter: Adapter, layout: Layout, about: About, staged: StagedExport, place: tuple[str, str]) -> None:
    """Write the adapter of a base laid out as `layout` to `place`: a product of `staged` and the file's name."""
    check(adapter)
    check_layout(adapter, layout)
    keys: list[Key] = [
        *general_keys(about, "adapter"),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", adapter.config.lora_alpha),
        ("general.file_type", int(gguf.LlamaFileType.ALL_F32)),
        ("general.quantization_version", gguf.GGML_QUANT_VERSION),
    ]
    infos = [(name, tuple(matrix.shape), F32) for name, matrix in expected_matrices(adapter, layout)]
    staged.append(*place, header(layout.arch, entries(keys), infos))
    for _, matrix in expected_matrices(adapter, layout):
        staged.append(*place, padded(matrix.numpy().tobytes()))


def expected_matrices(adapter: Adapter, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Name in the file and float32 values of each A (r, in) and B (out, r)."""
    alpha = adapter.config.lora_alpha
    for tensor in layout.tensors:
        if module := adapter.lora.get(tensor.parameter):
            a_RI, (first, last) = read_tensor(module.a).to(torch.float32), tensor.taken
            b_OR = read_tensor(module.b).to(torch.float32)[first:last] * _fold(module, alpha)
            columns = tensor.change.columns
            yield f"{tensor.name}.lora_a", a_RI if columns is None else a_RI[:, columns].contiguous()
            yield f"{tensor.name}.lora_b", tensor.change.to_gguf(b_OR, tensor.unit).contiguous()


def _fold(module: LoraModule, alpha: float) -> float:
    """What B is multiplied by, so that alpha / r of the file gives the module's own scale."""
    return module.scale / (alpha / module.a.shape[0])
