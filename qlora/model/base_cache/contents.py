"""What a base in 4 bit consists of: a blob for each decoder layer, and the tensors that are in none.

Known of a model on `meta` as well as of one that is loaded, so that a folder's size is known before a byte is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from qlora.model.base_cache.record import FORM, Settings
from qlora.model.base_folder import BaseFolder
from qlora.model.layer_blobs import ALIGNMENT, LayerWeights, stacks_of
from qlora.model.layer_walk import layers_of, stays_fp32
from qlora.model.meta_model import MetaModel, taken_tensors
from qlora.model.nf4 import BLOCK, NESTED_BLOCK, QUANTIZER
from qlora.model.tensors import total_bytes
from qlora.model.weight_streaming import inside
from qlora.recipe.sections import QuantizationSection
from qlora.step.layerwise import recomputable


@dataclass(frozen=True)
class Contents:
    """Of `base` as `meta_model` holds it, its 4-bit layers in place, and how it is put into 4 bit.

    `four_bit` are weights that are kept in 4 bit, with their shapes; `stacks` the experts of a projection that are;
    `plain` all other values that come from the files, with the type that they get.
    """

    base: BaseFolder
    meta_model: MetaModel
    quantization: QuantizationSection

    @cached_property
    def four_bit(self) -> Mapping[str, tuple[int, int]]:
        model = self.meta_model.model
        layers = ((name, module) for name, module in model.named_modules() if is_4bit(module))
        return {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in layers}

    @cached_property
    def plain(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        model = self.meta_model.model
        return {
            name: _final(model, name) for name in self.names if name not in self.four_bit.keys() | self.stacks.keys()
        }

    @cached_property
    def stacks(self) -> Mapping[str, Any]:
        return dict(stacks_of(self.meta_model.model))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all values that come from the files."""
        return (*self.meta_model.sources, *self.meta_model.experts)

    @cached_property
    def settings(self) -> Settings:
        """What decides the bytes beside the base's own."""
        sources = self.meta_model.sources
        forms = [
            [name, sources[name], *(self.four_bit.get(name) or (str(self.plain[name][0]), self.plain[name][1]))]
            for name in sorted(sources)
        ]
        pieces = self.meta_model.experts
        forms += [
            [name, [one.tensor for one in pieces[name]], *(self._form_of_stack(name) or map(str, self.plain[name]))]
            for name in sorted(pieces)
        ]
        return Settings(
            form=FORM,
            type=self.quantization.type,
            double_quant=self.quantization.double_quant,
            structure=blake3(json.dumps(forms).encode()).hexdigest(),
            quantizer=f"{QUANTIZER}, bitsandbytes {_version('bitsandbytes')}",
        )

    @cached_property
    def original_bytes(self) -> int:
        """What reading the original takes."""
        return total_bytes(taken_tensors(self.base, self.meta_model).values())

    @cached_property
    def kept_bytes(self) -> int:
        """What the folder will have: to the byte but for its manifest where we put it into 4 bit, at most where it is
        stored so."""
        plain = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.plain.values())
        if self.base.stored_4bit:
            return max(plain, self.original_bytes)
        return plain + self.bytes_of((*self.four_bit, *self.stacks))

    def bytes_of(self, names: Iterable[str]) -> int:
        """What these of its values have in a blob; of a base that is stored in 4 bit, as we would put it there."""
        found = 0
        for name in names:
            if shape := self.four_bit.get(name):
                found += _bytes_4bit(shape, self.quantization.double_quant)
            elif stack := self.stacks.get(name):
                sizes = (math.prod(stack.sizes[part][0]) * stack.sizes[part][1].itemsize for part in _parts(stack))
                found += sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
            else:
                dtype, whole = self.plain[name]
                found += math.prod(whole) * dtype.itemsize
        return found

    def _form_of_stack(self, name: str) -> list[Any] | None:
        """How the experts of a projection are held; None where that is in 16 bit."""
        if (stack := self.stacks.get(name)) is None:
            return None
        return [stack.quant_type, list(stack.shape), [[part, *map(str, stack.sizes[part])] for part in _parts(stack)]]


def _parts(stack: Any) -> list[str]:
    return [part for part in stack.IN_BLOB if part in stack.sizes]


def is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def groups(model: Any, names: Collection[str]) -> Iterator[tuple[str, LayerWeights]]:
    """Of a loaded model: each decoder layer's name and matrices; under "" the 4-bit ones that are in no layer.

    `names` are those under which the files have a value. A layer that is streamed is on the device while it is had. A
    matrix that several layers share is in the blob of the one under whose name the files have it.
    """
    layers = {id(module) for module in _layers(model)}
    prefixes = [name for name, module in model.named_modules() if id(module) in layers]
    streamed, numbers = inside(model), {id(layer): number for number, layer in enumerate(recomputable(model))}
    for prefix in prefixes:
        layer = model.get_submodule(prefix)
        with nullcontext() if streamed is None else streamed.in_place(numbers[id(layer)]):
            yield prefix, LayerWeights(layer, partial(_is_elsewhere, names, prefix))
    beginnings = tuple(f"{prefix}." for prefix in prefixes)
    outside = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_4bit(module) and not f"{name}.".startswith(beginnings)
    }
    if outside:
        yield "", LayerWeights(model, lambda name: name not in outside)


def _is_elsewhere(names: Collection[str], prefix: str, name: str) -> bool:
    return f"{prefix}.{name}" not in names


def value_of(model: Any, name: str) -> Tensor:
    """A model's parameter or buffer by its name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    found: Tensor = module._buffers[leaf] if leaf in module._buffers else module._parameters[leaf]
    return found


def dtype_of(model: Any, name: str) -> torch.dtype:
    """The type that a parameter has once it is loaded, where it is not in 4 bit: bf16 but for what stays in fp32."""
    return torch.float32 if stays_fp32(model, name, value_of(model, name)) else torch.bfloat16


def _final(model: Any, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    owner, _, leaf = name.rpartition(".")
    value = value_of(model, name)
    is_buffer = leaf in model.get_submodule(owner)._buffers
    return value.dtype if is_buffer else dtype_of(model, name), tuple(value.shape)


def _layers(model: Any) -> Sequence[nn.Module]:
    try:
        return layers_of(model)
    except LookupError:  # then every matrix in 4 bit is in none
        return ()


def _bytes_4bit(shape: tuple[int, int], double_quant: bool) -> int:
    values = math.prod(shape)
    blocks = -(-values // BLOCK)
    parts = [-(-values // 2), *([blocks, 4 * -(-blocks // NESTED_BLOCK)] if double_quant else [4 * blocks])]
    return sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # an own build that is on the path
        return "unknown"
