"""Candidates for an export, computed by transformers: what the merged weights, a folder or a GGUF file predict.

Weights are made when the computation asks for them, a layer at a time (`model.layer_walk`): merged on the fly, read
from a written folder, dequantized from a GGUF file. A candidate is in memory whole only where its layers take more than
what the layer before gives (`model.family_facts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.device import free_bytes
from qlora.errors import ExportError
from qlora.export.gguf.family import GgufTensor
from qlora.export.gguf.packed import unpack
from qlora.export.merge.experts import VALUES_PER_BLOCK, name_of_piece
from qlora.export.merge.merge import MergedTensor
from qlora.model.base_folder import BaseFolder
from qlora.model.family_facts import facts_of
from qlora.model.layer_walk import WeightHolder, layers_of, move_buffers, trained_hidden, trained_hidden_states
from qlora.model.meta_model import MetaModel
from qlora.model.mxfp4 import decoded
from qlora.model.tensors import read_tensor
from qlora.step.forward import CausalParts, hidden_states
from qlora.step.loss import LogitsTransform, chunk_tokens, logits_transform

Weights = Mapping[str, Callable[[], Tensor]]  # by parameter name of the causal model; a tied head may be missing


def of_merge(tensors: Iterable[MergedTensor]) -> Weights:
    """Weights merged when they are asked for, each a block of rows at a time."""
    return {tensor.parameter: partial(_gather, tensor) for tensor in tensors}


def of_folder(meta_model: MetaModel, folder: BaseFolder) -> Weights:
    """Weights read from a folder of safetensors, `meta_model` built from that same folder."""
    weights = {name: partial(read_tensor, folder.tensors[source]) for name, source in meta_model.sources.items()}
    pieces = [piece for of_one in meta_model.experts.values() for piece in of_one]
    weights |= {name_of_piece(folder, piece): partial(read_tensor, folder.tensors[piece.tensor]) for piece in pieces}
    return with_experts(weights, meta_model, folder)


def with_experts(weights: Weights, meta_model: MetaModel, base: BaseFolder) -> Weights:
    """`weights` with the projections of experts, whose pieces are among them by their names in the checkpoint."""
    found = dict(weights)
    for parameter, pieces in meta_model.experts.items():
        if parameter in weights:  # merged, and so in 16 bit
            continue
        shape = tuple(meta_model.model.get_parameter(parameter).shape)
        own = [weights[name_of_piece(base, piece)] for piece in pieces]
        found[parameter] = partial(_unpacked, *own) if pieces[0].form else partial(_stacked, own, shape)
    return found


def of_gguf(file: Path, tensors: Iterable[GgufTensor]) -> Weights:
    """Weights of a GGUF file, dequantized and in transformers' order again; `tensors` are its layout's."""
    stored = {entry.name: entry for entry in gguf.GGUFReader(file).tensors}
    lost = [tensor.name for tensor in tensors if tensor.name not in stored]
    if lost:
        raise ExportError(f"{file}: has no tensor {lost[0]}", "export again")
    parts: dict[str, list[GgufTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.taken):
        parts.setdefault(tensor.parameter, []).append(tensor)
    return {parameter: partial(_dequantized, stored, pieces) for parameter, pieces in parts.items()}


def vocabulary_logprobs(
    model: Any, weights: Weights, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Tensor]:
    """Log-probabilities of the whole vocabulary at the trained positions, in order, as fp32 chunks (C, V).

    `model` is a meta_model's and its parameters are on `meta` again afterwards; its buffers are moved to `device`.
    Raises ExportError for a weight that `weights` lacks, and where a model that must be in memory whole does not fit.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers() if name in weights]
    holder = WeightHolder(model.eval(), names, partial(_fetch, model, weights), device, dtype)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    placed = [batch.to(device) for batch in batches]
    with torch.no_grad():
        hidden_ND = _hidden_states(holder, placed)
        with holder.holding(holder.names_under(head)):
            yield from head_logprobs(hidden_ND, head, logits_transform(config), chunk_tokens(config.vocab_size))


def _hidden_states(holder: WeightHolder, batches: Sequence[Batch]) -> Tensor:
    """The last hidden states (N, D) of the trained positions, layer by layer where that is what the trunk does."""
    model = holder.model
    try:
        layers = layers_of(model)
    except LookupError as error:
        return _whole(holder, batches, str(error))
    if reason := facts_of(model.config.get_text_config(), type(model).__name__).layerwise:
        return _whole(holder, batches, reason)
    return trained_hidden_states(holder, layers, batches)


def _whole(holder: WeightHolder, batches: Sequence[Batch], reason: str) -> Tensor:
    """The last hidden states (N, D) of the trained positions, by the model's own trunk with all of its weights."""
    model = holder.model
    needed = sum(parameter.numel() * holder.dtype.itemsize for parameter in model.parameters())
    free = free_bytes(holder.device)
    if needed > free:
        what = f"{reason}: measured whole it takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise ExportError(what, "export with verify=False, or on a machine with more memory")
    move_buffers(model, holder.device)
    head = {*holder.names_under(model.get_output_embeddings())}
    embedding = {*holder.names_under(model.get_input_embeddings())}
    parts = CausalParts.of(model)
    with holder.holding([name for name in holder.names if name in embedding or name not in head]):
        return torch.cat([trained_hidden(hidden_states(parts, batch), batch) for batch in batches])


def head_logprobs(
    hidden_ND: Tensor, head: nn.Module, transform: LogitsTransform | None, chunk: int
) -> Iterator[Tensor]:
    """fp32 log-probabilities (C, V) of the whole vocabulary, `chunk` positions at a time, as the loss computes them."""
    for start in range(0, hidden_ND.shape[0], chunk):
        logits_CV = head(hidden_ND[start : start + chunk].to(next(head.parameters()).dtype))  # as in step/loss.py
        if transform is not None:
            logits_CV = transform(logits_CV)
        yield torch.log_softmax(logits_CV.float(), dim=-1)


def dequantized_rows(entry: Any, start: int, end: int) -> Tensor:
    """Rows, as the file says them in fp32, of a tensor that gguf's reader has mapped; a vector is one row, and of
    stacked matrices the rows are counted through."""
    flat = len(entry.shape) == 1
    data = entry.data.reshape(1, -1) if flat else entry.data.reshape(-1, entry.data.shape[-1])[start:end]
    block = torch.from_numpy(_dequantize(data, entry.tensor_type))
    return block[0] if flat else block


def packed_rows(entry: Any, tensor: GgufTensor, start: int, end: int) -> Tensor:
    """The codes, or the scales, that a tensor in MXFP4 has of experts, as they are published, as fp32."""
    stored = torch.from_numpy(entry.data.reshape(*tensor.stored[:2], -1)[start:end].copy())
    return unpack(stored, tensor.packed).float()


def _dequantize(data: NDArray[Any], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """What gguf makes of bytes, in memory of its own; of Q8_0, most of what is exported, without its groups of rows."""
    if kind == gguf.GGMLQuantizationType.Q8_0:
        blocks = data.reshape(*data.shape[:-1], -1, 34)
        values: NDArray[np.float32] = blocks[..., 2:].view(np.int8).astype(np.float32)
        values *= blocks[..., :2].copy().view(np.float16).astype(np.float32)
        return values.reshape(*data.shape[:-1], -1)
    found: NDArray[np.float32] = gguf.quants.dequantize(data, kind)
    return found.copy() if np.may_share_memory(found, data) else found  # F32 is the mapped file, which is read-only


def _fetch(model: Any, weights: Weights, name: str, empty: Tensor) -> Tensor:
    """The values of the parameter `name`, which fit into the place of `empty`."""
    stored = name if name in weights else model.all_tied_weights_keys.get(name)
    if stored not in weights:
        raise ExportError(f"{name}: the exported model has no such weight", "export again")
    values = weights[stored]()
    # An adapter may have changed the number of rows of embedding and head.
    ends = (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters())
    first = 1 if any(empty is end for end in ends) else 0
    if values.shape[first:] != empty.shape[first:]:
        what = f"{name}: is {list(values.shape)} in the exported model, not {list(empty.shape)}"
        raise ExportError(what, "export again")
    return values


def _dequantized(stored: Mapping[str, Any], pieces: Sequence[GgufTensor]) -> Tensor:
    """A whole parameter in transformers' order, dequantized a block of rows at a time."""
    parts: dict[tuple[int, int], Tensor] = {}
    for piece in pieces:
        rows = torch.cat(list(_blocks(stored[piece.name], piece)))
        there = parts.get(piece.taken)  # another tensor holds a share of the same rows
        parts[piece.taken] = rows if there is None else there.add_(rows)
    return torch.cat(list(parts.values()))


def _blocks(entry: Any, tensor: GgufTensor) -> Iterator[Tensor]:
    if len(tensor.shape) < 2:
        yield tensor.inverse(dequantized_rows(entry, 0, 1))
        return
    if tensor.packed:
        for expert in range(tensor.stored[0]):
            yield tensor.inverse(packed_rows(entry, tensor, expert, expert + 1).to(torch.uint8))
        return
    first, last = tensor.taken
    values = math.prod(tensor.shape) // (last - first)  # of a row
    step = max(1, VALUES_PER_BLOCK // values // tensor.unit) * tensor.unit
    for start in range(0, last - first, step):
        count = min(last - first, start + step) - start
        at = tensor.at + tensor.matrix_rows(start)
        rows = dequantized_rows(entry, at, at + tensor.matrix_rows(count))
        yield tensor.inverse(rows.reshape(-1, *tensor.shape[1:]))


def _unpacked(blocks: Callable[[], Tensor], scales: Callable[[], Tensor]) -> Tensor:
    """A projection of experts in MXFP4 in bf16, with its parameter's sides: (E, in, out)."""
    return decoded(blocks(), scales(), torch.bfloat16).transpose(1, 2)


def _stacked(pieces: Sequence[Callable[[], Tensor]], shape: tuple[int, ...]) -> Tensor:
    """A projection of experts of its pieces: one of all of them, or each expert's rows one after the other."""
    if len(pieces) == 1:
        return pieces[0]()
    first = pieces[0]()
    whole = torch.empty(len(pieces), *first.shape, dtype=first.dtype)
    whole[0] = first
    for number, piece in enumerate(pieces[1:], start=1):
        whole[number] = piece()
    return whole.view(shape)


def _gather(tensor: MergedTensor) -> Tensor:
    """The whole tensor, filled block by block so that no second copy of it exists."""
    whole: Tensor | None = None
    start = 0
    for block in tensor.blocks(1):
        if tuple(block.shape) == tensor.shape:
            return block
        if whole is None:
            whole = torch.empty(tensor.shape, dtype=block.dtype)
        whole[start : start + block.shape[0]] = block
        start += block.shape[0]
    assert whole is not None and start == tensor.shape[0], f"{tensor.name}: {start} rows of {tensor.shape}"
    return whole
