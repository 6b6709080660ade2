"""What each parameter of the merged model is made of: which tensor it is read from, and what the adapter does to it.

Where the base ties its head to its embeddings and the adapter changes one of the two alone, the merged model keeps them
apart. (peft's own merge adds to both at once, which is another model than the trained one.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qlora.errors import ExportError
from qlora.export.merge.experts import VALUES_PER_BLOCK as VALUES_PER_BLOCK
from qlora.export.merge.experts import ExpertPart, name_of_piece, parts_of_experts
from qlora.export.merge.experts import is_multimodal as is_multimodal
from qlora.model.adapter_config import shown
from qlora.model.adapter_folder import Adapter, LoraModule, TokenRows
from qlora.model.base_folder import BaseFolder
from qlora.model.expert_layout import ExpertAdapter
from qlora.model.expert_pieces import Piece, form_of
from qlora.model.layer_walk import stays_fp32
from qlora.model.meta_model import MetaModel, head_of, linear_layers
from qlora.model.nf4 import is_stored_4bit
from qlora.model.tensors import TensorEntry, read_tensor
from qlora.recipe.sections import QuantizationSection

MergeBase = Literal["nf4", "full"]
Storage = Literal["plain", "packed", "coded", "mxfp4"]


@dataclass(frozen=True)
class ParameterSource:
    """Where one parameter's values come from, and what is done to them.

    name     in the written checkpoint
    tensor   its name in the base's checkpoint
    storage  "plain": as `entry` stores it; "packed": as 4-bit codes in the checkpoint; "coded": to be put into 4 bit as
             training did; "mxfp4": experts as published, whose codes are `entry`, to be written in 16 bit
    scales   of "mxfp4"
    in_fp32  stored so, and computed so whatever the model's type, as some routers are: written so too
    expert   what of a projection of experts it is, where the adapter changes that: its own adapter is in it
    """

    name: str
    parameter: str
    tensor: str
    shape: tuple[int, ...]
    entry: TensorEntry
    storage: Storage = "plain"
    lora: LoraModule | None = None
    rows: TokenRows | None = None
    in_fp32: bool = False
    scales: TensorEntry | None = None
    expert: ExpertPart | None = None

    @property
    def as_bytes(self) -> bool:
        """Whether its bytes are written as they are stored: codes or scales of experts in MXFP4."""
        return self.storage == "plain" and self.entry.dtype == "U8"


@dataclass(frozen=True)
class Plan:
    """Where each parameter comes from, in the order of the base's tensors: merged, and of the base alone.

    `architecture` is the causal model's class; `embeddings` the token embeddings' parameter; `own_head`: the merged
    head has a weight of its own; `parted`: it shares one with the embeddings in the base.
    """

    merged: Mapping[str, ParameterSource]
    base: Mapping[str, ParameterSource]
    architecture: str
    embeddings: str
    own_head: bool
    parted: bool

    @property
    def in_mxfp4(self) -> bool:
        """Whether experts stay in MXFP4, as config.json goes on to say."""
        return any(source.as_bytes for source in self.merged.values())


def expert_pieces(base: BaseFolder, meta_model: MetaModel) -> dict[str, tuple[str, Piece]]:
    """The parameters that a merged model may have of experts, by name: the projection that each belongs to, and what of
    it it is: pieces as they are stored, or a projection whole."""
    whole = {projection: (projection, Piece(projection, None)) for projection in meta_model.experts}
    return whole | {
        name_of_piece(base, piece): (projection, piece)
        for projection, pieces in meta_model.experts.items()
        for piece in pieces
    }


def make_plan(
    base: BaseFolder, meta_model: MetaModel, adapter: Adapter, merge_base: MergeBase, quantization: QuantizationSection
) -> Plan:
    """The plan of `adapter` merged into `base`: onto linear layers as training quantized them, or the original ones.

    `meta_model` is the base's. Raises ExportError when adapter and base do not belong together, or when the base has no
    original weights.
    """
    if merge_base == "full" and base.stored_4bit:
        raise ExportError(
            f"{base.name}: is stored in 4 bit, there are no original weights in it",
            "merge with merge_base='nf4', or name the unquantized base with `base_model`",
        )
    model = meta_model.model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # A base stored in 4 bit keeps some layers in 16 bit on purpose: those are never quantized.
    in_4bit = merge_base == "nf4" and quantization.type != "none" and not base.stored_4bit
    coded = {f"{name}.weight" for name, _ in linear_layers(model)} if in_4bit else set()
    weights = dict(model.named_parameters(remove_duplicate=False))
    own: dict[str, ParameterSource] = {}
    for parameter, tensor in meta_model.sources.items():
        name = parameter if is_multimodal(base) else tensor
        storage: Storage = "packed" if is_stored_4bit(base, tensor) else "coded" if parameter in coded else "plain"
        entry = base.tensors[tensor]
        in_fp32 = entry.dtype == "F32" and parameter in weights and stays_fp32(model, parameter, weights[parameter])
        own[parameter] = ParameterSource(name, parameter, tensor, shapes[parameter], entry, storage, in_fp32=in_fp32)
    own |= {source.parameter: source for source in _of_experts(base, meta_model, adapter, shapes)}
    expert_parts = parts_of_experts(base, meta_model, adapter, quantization if in_4bit else None)
    places = {tensor: place for place, tensor in enumerate(base.tensors)}
    own = dict(sorted(own.items(), key=lambda item: places[item[1].tensor]))
    modules = {id(module): name for name, module in model.named_modules()}
    embeddings = f"{modules[id(model.get_input_embeddings())]}.weight"
    head = f"{modules[id(head_of(model))]}.weight"
    tied = None if head in own else replace(own[embeddings], name=head, parameter=head)
    _check(base.name, adapter, {**own, head: tied or own[head]}, (embeddings, head))
    merged = {name: _changed(source, adapter) for name, source in own.items()}
    merged |= {name: replace(own[name], expert=part) for name, part in expert_parts.items()}
    parted = tied and _parted_head(adapter, tied, merged[embeddings])
    if parted:
        merged[head] = parted
    if head in merged and merged[head].shape[0] != merged[embeddings].shape[0]:
        what = f"{head} has {merged[head].shape[0]} rows, {embeddings} {merged[embeddings].shape[0]}"
        hint = "the vocabulary was resized, but one of the two not saved: save with save_embedding_layers=True"
        raise ExportError(f"{adapter.folder}: {what}", hint)
    return Plan(merged, own, type(model).__name__, embeddings, head in merged, bool(parted))


def _of_experts(
    base: BaseFolder, meta_model: MetaModel, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[ParameterSource]:
    """Of the experts' tensors: frozen, whatever the layers beside them were trained on, their bytes are the base's own.

    An adapter on one of them would be rounded away in MXFP4 (its error is a ninth of a weight, 0.11): then all that is
    in it is written in 16 bit, as the parameters have it, since config.json says one thing of all.
    """
    adapted = any(parameter in meta_model.experts for parameter in adapter.parameters)
    for parameter, pieces in meta_model.experts.items():
        if adapted and pieces[0].form:
            (entry, blocks), (scales, _) = ((base.tensors[one.tensor], one) for one in pieces)
            name = form_of(name_of_piece(base, blocks))[1]
            shape = shapes[parameter]
            yield ParameterSource(name, parameter, blocks.tensor, shape, entry, "mxfp4", scales=scales)
            continue
        for piece in pieces:
            name, entry = name_of_piece(base, piece), base.tensors[piece.tensor]
            yield ParameterSource(name, name, piece.tensor, entry.shape, entry)


def _changed(source: ParameterSource, adapter: Adapter) -> ParameterSource:
    name = source.parameter
    if entry := adapter.whole.get(name) or adapter.under.get(name):
        source = replace(source, entry=entry, shape=entry.shape, storage="plain")
    return replace(source, lora=adapter.lora.get(name), rows=adapter.rows.get(name))


def _parted_head(adapter: Adapter, tied: ParameterSource, embeddings: ParameterSource) -> ParameterSource | None:
    """The head of a base that ties it to its embeddings, if the trained model's differs from them, else None."""
    head, other = tied.parameter, embeddings.parameter
    if any(head in trained for trained in (adapter.lora, adapter.whole, adapter.under, adapter.rows)):
        own = _changed(tied, adapter)
        return None if _same_values(own, embeddings) else own
    # peft lets a tied head follow single token rows and resized embeddings, but neither low-rank matrices on the
    # embeddings nor a copy of them that is trained whole.
    saved = adapter.config.modules_to_save or ()
    trained_whole = other in adapter.whole and any(f".{other}".endswith(f".{name}.weight") for name in saved)
    if embeddings.lora is None and not trained_whole:
        return None
    under = adapter.under.get(other)
    return replace(tied, entry=under, shape=under.shape) if under else tied


def _same_values(one: ParameterSource, other: ParameterSource) -> bool:
    """Whether two sources are certain to give the same weight."""
    if (one.shape, one.entry.dtype, one.storage) != (other.shape, other.entry.dtype, other.storage):
        return False
    if one.entry != other.entry:
        step = max(1, VALUES_PER_BLOCK // max(1, math.prod(one.shape[1:])))
        spans = [(at, min(one.shape[0], at + step)) for at in range(0, one.shape[0], step)]
        if not all(torch.equal(read_tensor(one.entry, span), read_tensor(other.entry, span)) for span in spans):
            return False
    return _factors_equal(one.lora, other.lora) and _rows_equal(one.rows, other.rows)


def _factors_equal(one: LoraModule | None, other: LoraModule | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.magnitude or other.magnitude or one.scale != other.scale or one.shape != other.shape:
        return False
    pairs = [
        (read_tensor(lora.a).T, read_tensor(lora.b)) if lora.embedding else (read_tensor(lora.b), read_tensor(lora.a).T)
        for lora in (one, other)
    ]
    return torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])


def _rows_equal(one: TokenRows | None, other: TokenRows | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.ids == other.ids and torch.equal(read_tensor(one.values), read_tensor(other.values))


def _check(name: str, adapter: Adapter, base: Mapping[str, ParameterSource], vocabulary: tuple[str, str]) -> None:
    """Every trained tensor has its place in the base, in the right shape, and something was trained at all."""
    folder, hint = adapter.folder, "name the base that it was trained on with `base_model`"
    if not adapter.parameters:
        raise ExportError(f"{folder}: nothing to merge, the adapter holds no tensors", "train it first")
    named = [parameter for parameter in adapter.parameters if parameter not in adapter.experts]
    if lost := [parameter for parameter in (*adapter.under, *named) if parameter not in base]:
        more = f", and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise ExportError(f"{folder}: {shown(lost[0])} is not in the base {name}{more}", hint)
    owners = tuple(weight.removesuffix("weight") for weight in vocabulary)
    for parameter, entry in (*adapter.whole.items(), *adapter.under.items()):
        shape = base[parameter].shape
        resizable = parameter.startswith(owners) and len(entry.shape) == len(shape) and entry.shape[0] > 0
        if entry.shape != shape and not (resizable and entry.shape[1:] == shape[1:]):
            raise ExportError(f"{folder}: {shown(parameter)} is {entry.shape} here and {shape} in {name}", hint)
    for parameter in (*adapter.lora, *adapter.rows):
        source = _changed(base[parameter], adapter)
        fits = source.lora is None or source.lora.shape == source.shape
        if source.rows is not None and fits:
            fits = source.rows.values.shape[1:] == source.shape[1:] and max(source.rows.ids) < source.shape[0]
        if not fits:
            trained = source.lora.shape if source.lora else source.rows and source.rows.values.shape
            raise ExportError(f"{folder}: {shown(parameter)} is {trained} here and {source.shape} in {name}", hint)
    low_rank: list[LoraModule | ExpertAdapter] = [*adapter.lora.values(), *adapter.experts.values()]
    if not adapter.whole and not adapter.rows and not any(map(_moves, low_rank)):
        raise ExportError(f"{folder}: nothing to merge, every lora_B is zero", "train it first")


def _moves(lora: LoraModule | ExpertAdapter) -> bool:
    has_magnitude = isinstance(lora, LoraModule) and lora.magnitude is not None
    return has_magnitude or all(bool(read_tensor(entry).any()) for entry in (lora.a, lora.b))
