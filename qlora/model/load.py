"""The frozen base: built without weights, then streamed in, one tensor at a time, each straight into its final form.

A linear layer's weight is read in blocks of rows, quantized on the device, and only its 4-bit form is kept; all else is
cast to bf16 block by block. Nothing is ever in memory twice, and no file stays open or mapped between tensors.
(Embeddings, norms and the head stay in bf16: casting them to fp32, as peft's `prepare_model_for_kbit_training` does,
costs 2.5 GB on an 8B model and changes no result that we could measure.)
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.events import Notice, Progress, Sink
from qlora.model import attention_choice, linear_use
from qlora.model.base_cache.contents import Contents, dtype_of, is_4bit
from qlora.model.base_cache.keeping import Keeping
from qlora.model.base_folder import BaseFolder
from qlora.model.config_filter import reduce_config
from qlora.model.identity import WeightReader
from qlora.model.meta_model import MetaModel, build, head_of, linear_layers
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
from qlora.model.weight_receiving import Place, Receiving, place_by_room, receive, took
from qlora.third_party import import_bitsandbytes

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
) -> PreTrainedModel:
    """The frozen causal model of `base` on `device`, its linear layers quantized as `quantization` says.

    `place` is what of it is on the host; None: its layers, where the device has no room for them.

    Its `base_identity` is which base it was; `base_was_kept`: the cache had it in 4 bit, and of its own weights samples
    were read. Peak memory above what is resident: the model's final form, two blocks of rows, and scratch. Raises
    ModelError, for values that are not finite too.
    """
    if base.stored_4bit and quantization.type == "none":
        what = f'{base.name} is stored in 4 bit, so quantization.type = "none" is not possible'
        raise ModelError(what, 'set quantization.type = "nf4", or name the original base')
    meta_model = build(base, attention)
    model = meta_model.model
    swap_all_linear(meta_model, base, quantization)
    _report(meta_model, base, quantization, sink)
    receiving = receive(model, place or place_by_room(model, quantization, device), device)
    keeping = Keeping(Contents(base, meta_model, quantization), sink)
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
    attention_choice.settle(model.eval(), attention, device, sink)
    keeping.keep(model, identity)
    return model  # type: ignore[no-any-return]


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


def swap_linear(model: Any, name: str, linear: nn.Linear, quantization: QuantizationSection) -> Any:
    """Puts a 4-bit layer, still without weights, in the place of a linear layer, and returns it."""
    layer = import_bitsandbytes().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        device="meta",
    )
    # On CPUs with AVX512-BF16 the layer's first evaluation forward would rewrite its weight in place into another
    # packing, and training, dequantizing and merging afterwards would read garbage.
    layer.support_avx512bf16_for_cpu = False
    model.set_submodule(name, layer)
    return layer


def _stream(meta_model: MetaModel, reader: WeightReader, base: BaseFolder, receiving: Receiving, sink: Sink) -> None:
    """Fills the model in the order of the files, so that a disk is read from front to back."""
    model = meta_model.model
    entries = {name: base.tensors[source] for name, source in meta_model.sources.items()}
    total, done = total_bytes(entries.values()), 0
    for name in sorted(entries, key=lambda name: (str(entries[name].file), entries[name].offset)):
        source, device = meta_model.sources[name], receiving.device_of(name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if is_4bit(module) and leaf == "weight":
            value: Quantized | Tensor = _quantized(reader, base, source, module, device)
        elif leaf in module._buffers:
            value = _read_as(reader, source, module._buffers[leaf].dtype, device)
        elif is_stored_4bit(base, source):  # the head, stored in 4 bit
            stored = _in_4bit(reader, base, source, tuple(module._parameters[leaf].shape), device)
            value = dequantize(stored, torch.bfloat16)
        else:
            value = _read_as(reader, source, dtype_of(model, name), device)
        _place(model, name, value)
        done += entries[name].nbytes
        sink.emit(Progress("load", done, total, "B"))


def _place(model: Any, name: str, value: Quantized | Tensor) -> None:
    """Gives a model one of its values."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(value, Quantized):
        set_4bit(module, value)
    elif leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
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


def set_4bit(layer: Any, quantized: Quantized, kind: Any = None) -> None:
    """Gives a 4-bit layer its weight, as bitsandbytes does it itself (as a parameter of class `kind`)."""
    layer.weight = (kind or import_bitsandbytes().nn.Params4bit)(
        quantized.data,
        requires_grad=False,
        quant_state=quantized.state,
        blocksize=quantized.state.blocksize,
        compress_statistics=quantized.state.nested,
        quant_type=quantized.state.quant_type,
        quant_storage=quantized.data.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = quantized.state


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


def _report(meta_model: MetaModel, base: BaseFolder, quantization: QuantizationSection, sink: Sink) -> None:
    """Emit what differs from what a reader of the recipe would expect."""
    if dropped := reduce_config(base.config).dropped:
        some = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
        message = f"keys of config.json that this model does not know are not read: {some}"
        sink.emit(Notice("model", message, len(dropped)))
    if meta_model.skipped:
        mib = total_bytes(base.tensors[name] for name in meta_model.skipped) / 2**20
        message = f"{len(meta_model.skipped)} tensors ({mib:.1f} MiB) that the text model does not use are skipped"
        sink.emit(Notice("model", f"{message}, {meta_model.skipped[0]} among them", len(meta_model.skipped)))
    if base.stored_4bit:
        kept = sum(is_4bit(module) for module in meta_model.model.modules())
        message = f"the base is stored in 4 bit and stays as it is: {kept} layers, the others in 16 bit"
        sink.emit(Notice("quantization", message, kept))
    for notice in linear_use.notices(meta_model.model):
        sink.emit(notice)
    expected = {*(layer for _, layer in linear_layers(meta_model.model)), head_of(meta_model.model)}
    odd = Counter(
        type(module).__name__
        for module in meta_model.model.modules()
        if module not in expected
        and not isinstance(module, nn.Embedding)
        and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
    )
    if odd and quantization.type != "none":
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(odd.items()))
        sink.emit(Notice("quantization", f"layers that stay in 16 bit: {layers}", sum(odd.values())))
