"""What of a base differs from what a reader of the recipe would expect, said before it is loaded."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from qlora.events import Notice, Sink
from qlora.model import experts, linear_use
from qlora.model.base_cache.contents import is_4bit
from qlora.model.base_folder import BaseFolder
from qlora.model.config_filter import reduce_config
from qlora.model.meta_model import MetaModel, head_of, linear_layers
from qlora.model.mixtures import experts_and_routers
from qlora.model.tensors import total_bytes
from qlora.units import MIB

if TYPE_CHECKING:
    from qlora.recipe.sections import QuantizationSection


def report(meta_model: MetaModel, base: BaseFolder, quantization: QuantizationSection, sink: Sink) -> None:
    """Emit what differs from what a reader of the recipe would expect."""
    if dropped := reduce_config(base.config).dropped:
        some = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
        message = f"keys of config.json that this model does not know are not read: {some}"
        sink.emit(Notice("model", message, len(dropped)))
    if meta_model.skipped:
        mib = total_bytes(base.tensors[name] for name in meta_model.skipped) / MIB
        message = f"{len(meta_model.skipped)} tensors ({mib:.1f} MiB) that the text model does not use are skipped"
        sink.emit(Notice("model", f"{message}, {meta_model.skipped[0]} among them", len(meta_model.skipped)))
    if base.stored_4bit:
        kept = sum(is_4bit(module) for module in meta_model.model.modules())
        message = f"the base is stored in 4 bit and stays as it is: {kept} layers, the others in 16 bit"
        sink.emit(Notice("quantization", message, kept))
    for notice in linear_use.notices(meta_model.model):
        sink.emit(notice)
    for notice in experts.notices(meta_model.model, quantization):
        sink.emit(notice)
    expected = {*(layer for _, layer in linear_layers(meta_model.model)), head_of(meta_model.model)}
    expected |= {module for _, module in experts_and_routers(meta_model.model)}
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
