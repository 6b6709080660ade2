"""A causal model computed layer by layer, its weights made only when their layer's turn comes.

The weights come from anywhere: merged on the fly, read from a written folder, dequantized from a GGUF file. All
micro-batches pass a layer before the next layer's weights are made, so that each weight is made once (the embedding and
a tied head twice, a weight outside the layers twice), and memory is one layer, or embedding or head, and the hidden
states. accelerate's offloading hooks would make every weight again for every micro-batch.

The model's own forward is what runs. It is called twice with its layers replaced: first to learn what it hands to each
layer (masks, positions, rotary tables), then to do what comes after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.errors import ExportError
from qlora.export.gguf.architectures import GgufTensor
from qlora.export.merge.merge import MergedTensor
from qlora.export.merge.parts import VALUES_PER_BLOCK
from qlora.model.base_folder import BaseFolder
from qlora.model.meta_model import MetaModel
from qlora.model.tensors import read_tensor
from qlora.step.loss import LogitsTransform, chunk_tokens, logits_transform

Weights = Mapping[str, Callable[[], Tensor]]  # by parameter name of the causal model; a tied head may be missing


@dataclass(frozen=True)
class Compute:
    """Where and in what a model is computed: bf16 as in training, fp32 to check a file exactly."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16


@dataclass
class _Passed:
    """One micro-batch under way: its hidden states, and what the trunk hands to each layer beside them."""

    batch: Batch
    hidden_BSD: Tensor | None = None
    in_tuple: bool = False  # older models' layers give their hidden states as the first of a tuple
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def keep(self, output: Any) -> None:
        """Take a layer's output."""
        self.in_tuple = isinstance(output, tuple)
        self.hidden_BSD = output[0] if self.in_tuple else output

    def handed_on(self) -> Any:
        """The hidden states in the form that the trunk expects of a layer."""
        return (self.hidden_BSD,) if self.in_tuple else self.hidden_BSD


def of_merge(tensors: Iterable[MergedTensor]) -> Weights:
    """Weights merged when they are asked for, each a block of rows at a time."""
    return {tensor.parameter: partial(_gather, tensor) for tensor in tensors}


def of_folder(meta_model: MetaModel, folder: BaseFolder) -> Weights:
    """Weights read from a folder of safetensors, `meta_model` drawn from that same folder."""
    return {name: partial(read_tensor, folder.tensors[source]) for name, source in meta_model.sources.items()}


def of_gguf(file: Path, tensors: Iterable[GgufTensor]) -> Weights:
    """Weights of a GGUF file, dequantized and in transformers' order again; `tensors` are its layout's."""
    stored = {entry.name: entry for entry in gguf.GGUFReader(file).tensors}
    lost = [tensor.name for tensor in tensors if tensor.name not in stored]
    if lost:
        raise ExportError(f"{file}: has no tensor {lost[0]}", "export again")
    return {tensor.parameter: partial(_dequantized, stored[tensor.name], tensor) for tensor in tensors}


def dequantized_rows(entry: Any, unit: int) -> Iterator[Tensor]:
    """Blocks of rows, multiples of `unit`, of a tensor that gguf's reader has mapped: fp32, as the file says them."""
    flat = len(entry.shape) == 1
    data = entry.data.reshape(1, -1) if flat else entry.data
    rows = data.shape[0]
    step = max(1, VALUES_PER_BLOCK // (int(entry.n_elements) // rows) // unit) * unit
    for start in range(0, rows, step):
        # A copy: an F32 tensor would be the mapped file itself, which is read-only.
        block = torch.from_numpy(np.array(gguf.quants.dequantize(data[start : start + step], entry.tensor_type)))
        yield block[0] if flat else block


def vocabulary_logprobs(model: Any, weights: Weights, batches: Sequence[Batch], compute: Compute) -> Iterator[Tensor]:
    """Log-probabilities of the whole vocabulary at the trained positions, in order, as fp32 chunks (C, V).

    `model` is a meta_model's: parameters on `meta`, buffers real; it is so again afterwards. Raises ExportError for a
    model whose layers are not found, or a weight that `weights` lacks.
    """
    model.eval()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(compute.device) if buffer is not None else None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    token_rows = frozenset(name for module in ends for name in _names_under(model, module))
    source = _Source(model, weights, compute, token_rows)
    with torch.no_grad():
        hidden_ND = _hidden_states(model, source, [batch.to(compute.device) for batch in batches])
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        with source.filled(_names_under(model, head)):
            yield from head_logprobs(hidden_ND, head, logits_transform(config), chunk_tokens(config.vocab_size))


def head_logprobs(
    hidden_ND: Tensor, head: nn.Module, transform: LogitsTransform | None, chunk: int
) -> Iterator[Tensor]:
    """fp32 log-probabilities (C, V) of the whole vocabulary, `chunk` positions at a time, as the loss computes them."""
    for start in range(0, hidden_ND.shape[0], chunk):
        logits_CV = head(hidden_ND[start : start + chunk])
        if transform is not None:
            logits_CV = transform(logits_CV)
        yield torch.log_softmax(logits_CV.float(), dim=-1)


def trained_hidden(hidden_BSD: Tensor, batch: Batch) -> Tensor:
    """The hidden states (T, D) of a micro-batch's trained positions."""
    return hidden_BSD.flatten(0, 1).index_select(0, batch.trained_T)


@dataclass(frozen=True)
class _Source:
    """Gives parameters of `model` their weights for as long as a block runs."""

    model: Any
    weights: Weights
    compute: Compute
    token_rows: frozenset[str]  # embedding and head: an adapter may have changed the number of their rows

    @contextmanager
    def filled(self, names: Iterable[str]) -> Iterator[None]:
        held = []
        try:
            for name in names:
                owner, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(owner)
                place = module._buffers if leaf in module._buffers else module._parameters
                held.append((place, leaf, place[leaf]))
                place[leaf] = self._make(name, place[leaf])
            yield
        finally:
            for place, leaf, empty in held:
                place[leaf] = empty

    def _make(self, name: str, empty: Tensor) -> Tensor:
        stored = name if name in self.weights else self.model.all_tied_weights_keys.get(name)
        if stored not in self.weights:
            raise ExportError(f"{name}: the exported model has no such weight", "export again")
        if isinstance(empty, nn.Parameter):
            dtype = torch.float32 if self._keeps_fp32(name) else self.compute.dtype
        else:
            dtype = empty.dtype
        made = self.weights[stored]().to(device=self.compute.device, dtype=dtype)
        rows_may_differ = name in self.token_rows
        if made.shape[rows_may_differ:] != empty.shape[rows_may_differ:]:
            what = f"{name}: is {list(made.shape)} in the exported model, not {list(empty.shape)}"
            raise ExportError(what, "export again")
        return nn.Parameter(made, requires_grad=False) if isinstance(empty, nn.Parameter) else made

    def _keeps_fp32(self, name: str) -> bool:
        return any(part in name for part in self.model._keep_in_fp32_modules_strict or ())


def _hidden_states(model: Any, source: _Source, batches: Sequence[Batch]) -> Tensor:
    """The last hidden states (N, D) of the trained positions of all micro-batches."""
    trunk = model.base_model
    layers = _layers_of(model)
    stored = _stored_names(model, source.weights)
    of_layer = {id(layer): [name for name in stored if name in _names_under(model, layer)] for layer in layers}
    in_layers = {name for names in of_layer.values() for name in names}
    head = _names_under(model, model.get_output_embeddings())
    embedding = _names_under(model, model.get_input_embeddings())
    outside = [name for name in stored if name not in in_layers and name not in head - embedding]

    with source.filled([*outside, *of_layer[id(layers[0])]]):
        under_way = [_first_layer(trunk, layers, batch) for batch in batches]
    for number, layer in enumerate(layers[1:], start=1):
        with source.filled(of_layer[id(layer)]):
            for passed in under_way:
                args, named = passed.extras[number]
                passed.keep(layer(passed.hidden_BSD, *args, **named))
                passed.extras[number] = ((), {})  # masks are large, and no longer needed once every layer has them
    with source.filled([name for name in outside if name not in embedding]):
        return torch.cat([trained_hidden(_after_layers(trunk, layers, passed), passed.batch) for passed in under_way])


def _first_layer(trunk: Any, layers: Sequence[nn.Module], batch: Batch) -> _Passed:
    """Embeds a micro-batch and computes the first layer; of the others only what they are handed is kept."""
    passed = _Passed(batch)
    first = layers[0].forward

    def compute(hidden_BSD: Tensor, *args: Any, **named: Any) -> Any:
        passed.extras.append(((), {}))
        passed.keep(first(hidden_BSD, *args, **named))
        return passed.handed_on()

    def remember(_: Tensor, *args: Any, **named: Any) -> Any:
        passed.extras.append((args, named))
        return passed.handed_on()

    with _replaced(layers, [compute] + [remember] * (len(layers) - 1)):
        trunk(input_ids=batch.input_ids_BS, **_how(batch))
    return passed


def _after_layers(trunk: Any, layers: Sequence[nn.Module], passed: _Passed) -> Tensor:
    """What the trunk does after its last layer: at least a norm."""

    def skip(_: Tensor, *args: Any, **named: Any) -> Any:
        return passed.handed_on()

    with _replaced(layers, [skip] * len(layers)):
        output: Tensor = trunk(inputs_embeds=passed.hidden_BSD, **_how(passed.batch)).last_hidden_state
    return output


def _how(batch: Batch) -> dict[str, Any]:
    # As in step/forward.py: only so does transformers keep packed documents apart.
    return {"position_ids": batch.position_ids_BS, "attention_mask": None, "use_cache": False}


@contextmanager
def _replaced(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Calls `forwards` in the place of the layers' own for as long as the block runs."""
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _layers_of(model: Any) -> Sequence[nn.Module]:
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    what = f"{type(model).__name__}: its {wanted} layers are not found, so that it cannot be measured layer by layer"
    raise ExportError(what, "export with --no-verify, and compare a few answers yourself")


def _stored_names(model: Any, weights: Weights) -> list[str]:
    """Parameters, and the buffers that have a stored value."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return names + [name for name, _ in model.named_buffers() if name in weights]


def _names_under(model: Any, module: nn.Module) -> set[str]:
    prefix = next(name for name, other in model.named_modules() if other is module)
    return {f"{prefix}.{name}" for name in module.state_dict()}


def _dequantized(entry: Any, tensor: GgufTensor) -> Tensor:
    return torch.cat([tensor.inverse(rows) for rows in dequantized_rows(entry, tensor.unit)])


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
