"""The frozen base: built without weights, then streamed in, one tensor at a time, each straight into its final form.

A linear layer's weight is read in blocks of rows, quantized on the device, and only its 4-bit form is kept; all else is
cast to bf16 block by block. Nothing is ever in memory twice, and no file stays open or mapped between tensors.
(Embeddings, norms and the head stay in bf16: casting them to fp32, as peft's `prepare_model_for_kbit_training` does,
costs 2.5 GB on an 8B model and changes no result that we could measure.)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora import gathering
from qlora.errors import ModelError
from qlora.events import Progress, Sink
from qlora.model import attention_choice, expert_loading, experts, precision
from qlora.model.base_cache.contents import Contents, dtype_of, is_4bit
from qlora.model.base_cache.keeping import Keeping
from qlora.model.base_cache.reading import Kept, Stacked
from qlora.model.base_folder import BaseFolder
from qlora.model.four_bit_layers import set_4bit, swap_linear
from qlora.model.identity import WeightReader
from qlora.model.load_notices import report
from qlora.model.meta_model import MetaModel, build, linear_layers
from qlora.model.nf4 import (
    VALUES_PER_BLOCK,
    Quantized,
    dequantize,
    is_stored_4bit,
    quantize_rows,
    rows_in_block,
    stored_4bit,
)
from qlora.model.tensors import total_bytes
from qlora.model.weight_receiving import Place, Receiving, place_by_room, receive, settled, took

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora.recipe.sections import QuantizationSection


def load_base(
    base: BaseFolder,
    quantization: QuantizationSection,
    attention: str,
    device: torch.device,
    sink: Sink,
    place: Place | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """The frozen causal model of `base` on `device`, its linear layers quantized as `quantization` says, computing in
    `dtype`.

    `place` is what of it is on the host; None: its layers, where the device has no room for them.

    Its `base_identity` is which base it was; `base_was_kept`: the cache had it in 4 bit, and of its own weights samples
    were read. Peak memory above what is resident: the model's final form, two blocks of rows, and scratch. Raises
    ModelError, for values that are not finite too.
    """
    if base.stored_4bit and quantization.type == "none":
        what = f'{base.name} is stored in 4 bit, so quantization.type = "none" is not possible'
        raise ModelError(what, 'set quantization.type = "nf4", or name the original base')
    meta_model = build(base, attention)
    model, meta_model.model.config.dtype = meta_model.model, dtype
    swap_all_linear(meta_model, base, quantization)
    report(meta_model, base, quantization, sink)
    receiving = receive(model, place or place_by_room(model, quantization, device), device)
    keeping = Keeping(Contents(base, meta_model, quantization), sink)
    if receiving.place.shards == 1:  # else no process has all of a layer
        receiving.store = keeping.on_disk(receiving.names, receiving.wanted, device) or receiving.store
    identity = keeping.fill(partial(_place, model), receiving.home_of, device)
    if identity is None:
        keeping.check_room()
        receiving.begin_again()  # of what was damaged, nothing stays
        reader = WeightReader(base.config, base.tensors)
        _stream(meta_model, reader, base, receiving, sink)
        identity = reader.identity()
    model.tie_weights()
    freeze(model, device)
    lost = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if lost:
        what = f"{base.name}: {lost[0]} got no value while loading"
        raise ModelError(what, "this model is not supported; use another")
    receiving.finish(sink)
    model.config.name_or_path = base.name
    model.name_or_path = base.name
    model.base_identity, model.base_was_kept = identity, keeping.filled
    precision.settle(model, dtype)
    attention_choice.settle(model.eval(), attention, device, sink)
    precision.try_out(model, base.name, device, sink)
    together = gathering.of_run()
    first = together is None or together.place.local_rank == 0  # of those that load at the same time, one keeps it
    if dtype == torch.bfloat16 and first:  # from which fp16 is made as well
        keeping.keep(model, identity)
    return settled(model, sink)  # type: ignore[no-any-return]


def freeze(model: Any, device: torch.device) -> None:
    """Buffers to the device, no gradients; and the flag without which peft attaches its plain layers in silence."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None
    model.requires_grad_(False)
    model.is_loaded_in_4bit = any(is_4bit(module) for module in model.modules())


def swap_all_linear(meta_model: MetaModel, base: BaseFolder, quantization: QuantizationSection) -> None:
    """Put 4-bit layers in the place of all linear ones that `quantization` puts into 4 bit, still without weights."""
    if quantization.type != "none":
        for name, linear in list(linear_layers(meta_model.model)):
            # Whoever stored a base in 4 bit left some layers in 16 bit on purpose.
            if not base.stored_4bit or is_stored_4bit(base, meta_model.sources[f"{name}.weight"]):
                swap_linear(meta_model.model, name, linear, quantization)
    experts.hold(meta_model.model, quantization)


def _stream(meta_model: MetaModel, reader: WeightReader, base: BaseFolder, receiving: Receiving, sink: Sink) -> None:
    """Fills the model in the order of the files, so that a disk is read from front to back."""
    model = meta_model.model
    entries = {name: [base.tensors[source]] for name, source in meta_model.sources.items()}
    entries |= {name: [base.tensors[one.tensor] for one in pieces] for name, pieces in meta_model.experts.items()}
    total, done = total_bytes(entry for of_one in entries.values() for entry in of_one), 0
    for name in sorted(entries, key=lambda name: (str(entries[name][0].file), entries[name][0].offset)):
        done += total_bytes(entries[name])
        if name in meta_model.experts:
            expert_loading.load(model, name, meta_model.experts[name], reader, receiving.device)
            sink.emit(Progress("load", done, total, "B"))
            continue
        source, device = meta_model.sources[name], receiving.device_of(name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if is_4bit(module) and leaf == "weight":
            value: Kept = _quantized(reader, base, source, module, device)
        elif leaf in module._buffers:
            value = _read_as(reader, source, module._buffers[leaf].dtype, device)
        elif is_stored_4bit(base, source):  # the head, stored in 4 bit
            stored = _in_4bit(reader, base, source, tuple(module._parameters[leaf].shape), device)
            value = dequantize(stored, torch.bfloat16)
        else:
            value = _read_as(reader, source, dtype_of(model, name), device)
        _place(model, name, value)
        sink.emit(Progress("load", done, total, "B"))


def _place(model: Any, name: str, value: Kept) -> None:
    """Gives a model one of its values, in the type in which it is kept (`config.dtype` is what it computes in)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(value, Quantized):
        set_4bit(module, value)
    elif isinstance(value, Stacked):
        getattr(module, leaf).take(value.buffers)
    elif leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        kept = precision.placed(module, leaf, value, model.config.dtype)
        module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)
    took(model, name)


def _quantized(reader: WeightReader, base: BaseFolder, source: str, layer: Any, device: torch.device) -> Quantized:
    if is_stored_4bit(base, source):
        return _in_4bit(reader, base, source, (layer.out_features, layer.in_features), device)
    return quantize_rows(
        lambda start, end: reader.read(source, (start, end)).to(torch.bfloat16),
        base.tensors[source].shape,
        layer.weight.quant_type,
        layer.weight.compress_statistics,
        device,
    )


def _in_4bit(
    reader: WeightReader, base: BaseFolder, source: str, shape: tuple[int, ...], device: torch.device
) -> Quantized:
    stored = stored_4bit(base, source, device, reader.read)
    if tuple(stored.state.shape) != shape:
        what = f"{base.name}: {source} is {list(stored.state.shape)} in 4 bit, but the model needs {list(shape)}"
        raise ModelError(what, "config.json and weights are of different models; get a clean copy")
    return stored


def _read_as(reader: WeightReader, source: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in `dtype` on `device`, cast in blocks of rows so that no second copy of it exists."""
    entry = reader.tensors[source]
    if entry.numel <= VALUES_PER_BLOCK or len(entry.shape) < 2:
        return reader.read(source).to(device=device, dtype=dtype)
    whole = torch.empty(entry.shape, dtype=dtype, device=device)
    rows = entry.shape[0]
    step = rows_in_block(entry.numel // rows)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        whole[start:end].copy_(reader.read(source, (start, end)))
    return whole
