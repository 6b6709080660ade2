"""Adapters on experts, merged expert by expert into the tensors that the base has on the disk, by its own names.

    merged = W + scale · B[rows, e::E] A[e]    of expert e, where a tensor holds some rows (gate's, or up's)

in fp32, rounded once. A tensor is an expert's share of a projection, or all experts, as the model has them or
transposed: what it is, transformers' table and the module's own attributes tell, never a shape. In memory at a time are
one expert's weights where all are in one tensor, else a block of its rows; of an expert in 4 bit its codes; and B of
the last few projections (6 MB in bf16 of Qwen3-30B's gate and up at rank 16), which every expert has columns in.

Elsewhere adapters on experts were dropped in silence, by names or shapes that nobody looked for. So each expert of each
adapted projection must have its place in one tensor for each of its parts, and what is added must change something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ExportError
from qlora.model import mxfp4
from qlora.model.adapter_config import shown
from qlora.model.adapter_folder import Adapter
from qlora.model.base_folder import BaseFolder
from qlora.model.expert_layout import ExpertAdapter
from qlora.model.expert_pieces import Piece
from qlora.model.experts import Slab, fill
from qlora.model.meta_model import MetaModel
from qlora.model.nf4 import BLOCK
from qlora.model.tensors import TensorEntry, read_ahead, read_tensor
from qlora.model.weight_names import text_name
from qlora.page_cache import LeftAsFound
from qlora.recipe.sections import QuantizationSection

# 2 MiB of fp32: stays in the cache between its steps, and its memory is taken and freed without new pages from the
# kernel. (Merging 14336 x 4096 on one thread of an EPYC: 1.2 G values a second, and 0.36 with 1 << 22.)
VALUES_PER_BLOCK = 1 << 19
See = Callable[[Tensor], None]  # what is shown each block of rows as it is read
Watch = Callable[[TensorEntry], See | None]
_KEPT = 3  # projections whose B is kept, and experts whose codes are: files have gate, up and down of an expert in turn


@dataclass(frozen=True)
class ExpertPart:
    """A tensor of experts that an adapter changes.

    piece       which expert, and which of its parts, it is
    shape       of the projection, (E, out, in), `transposed` on the disk where all experts are in one tensor
    siblings    the tensors of that expert's parts in their order, or the one of all experts
    quantized   as training held it, for a merge on that; None: the original values
    scales      of codes in MXFP4, which the one of `siblings` has; it is written in 16 bit, `transposed`
    """

    parameter: str
    adapter: ExpertAdapter
    piece: Piece
    shape: tuple[int, int, int]
    transposed: bool
    siblings: tuple[TensorEntry, ...]
    quantized: QuantizationSection | None = None
    scales: TensorEntry | None = None

    @property
    def entry(self) -> TensorEntry:
        return self.siblings[self.piece.part]

    @property
    def rows(self) -> tuple[int, int]:
        """Of an expert's outputs, those that the tensor has."""
        share = self.shape[1] // self.piece.parts
        return self.piece.part * share, (self.piece.part + 1) * share


@dataclass
class Reading:
    """What is kept while a model is merged: B of the last projections, codes of the last experts.

    `cache`: by which the base's rows are read that are not to stay in the page cache.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[tuple[str, int], Slab] = field(default_factory=dict)
    cache: LeftAsFound | None = None


def is_multimodal(base: BaseFolder) -> bool:
    """Whether the base's text model is a part of it, so that the merged model has another config and other names."""
    return isinstance(base.config.get("text_config"), Mapping)


def name_of_piece(base: BaseFolder, piece: Piece) -> str:
    """What a tensor of experts is called in a merged checkpoint: as in the base's, or in its text model's alone."""
    return text_name(piece.tensor) if is_multimodal(base) else piece.tensor


def parts_of_experts(
    base: BaseFolder, meta_model: MetaModel, adapter: Adapter, quantized: QuantizationSection | None
) -> dict[str, ExpertPart]:
    """Every tensor of experts that the adapter changes, by its name in the merged checkpoint.

    Raises ExportError for an adapter of other experts than the base's, and where one would be left out or used twice.
    """
    found: dict[str, ExpertPart] = {}
    places: Counter[tuple[str, int | None, int]] = Counter()
    for parameter, lora in adapter.experts.items():
        pieces = meta_model.experts.get(parameter)
        if pieces is None:
            what = f"{adapter.folder}: {shown(parameter)} is not in the base {base.name}"
            raise ExportError(what, "name the base that it was trained on with `base_model`")
        owner, _, leaf = parameter.rpartition(".")
        module = meta_model.model.get_submodule(owner)
        held = tuple(getattr(module, leaf).shape)
        if reason := lora.misfit(held, module.is_transposed):
            what = f"{adapter.folder}: the adapter of {shown(parameter)} {reason}"
            raise ExportError(what, "name the base that it was trained on, or save it with peft 0.19 or newer")
        shape = (held[0], held[2], held[1]) if module.is_transposed else held
        if pieces[0].form:
            entries = tuple(base.tensors[one.tensor] for one in pieces)
            whole = Piece(parameter, None)
            part = ExpertPart(parameter, lora, whole, shape, module.is_transposed, entries[:1], None, entries[1])
            found[parameter] = part
            places.update((parameter, expert, 0) for expert in range(shape[0]))
            continue
        coded = quantized if shape[1] * shape[2] % BLOCK == 0 else None  # else training held it in 16 bit
        for piece in pieces:
            own = [one for one in pieces if one.expert == piece.expert]
            entries = tuple(base.tensors[one.tensor] for one in own)
            on_disk = piece.expert is None and bool(module.is_transposed)
            found[name_of_piece(base, piece)] = ExpertPart(parameter, lora, piece, shape, on_disk, entries, coded)
            experts = range(shape[0]) if piece.expert is None else [piece.expert]
            places.update((parameter, expert, piece.part) for expert in experts)
    _check_places(adapter, found, places)
    return found


def _check_places(
    adapter: Adapter, found: Mapping[str, ExpertPart], places: Counter[tuple[str, int | None, int]]
) -> None:
    """Each expert of each adapted projection has one place a part, and no tensor is another's place too."""
    parts = {part.parameter: part.piece.parts for part in found.values()}
    wanted = {
        (parameter, expert, part)
        for parameter, lora in adapter.experts.items()
        for expert in range(lora.count)
        for part in range(parts.get(parameter, 1))
    }
    if wrong := sorted((wanted ^ places.keys()) | {place for place, times in places.items() if times != 1}):
        name, expert, _ = wrong[0]
        what = f"{adapter.folder}: the adapter of expert {expert} of {shown(name)} would not be used exactly once"
        raise ExportError(what, "report this base: its experts are stored in a way that is not known here")


def merged_blocks(
    part: ExpertPart, unit: int, device: torch.device, reading: Reading, watch: Watch = lambda entry: None
) -> Generator[Tensor, None, None]:
    """Blocks of the tensor's first dimension, each of a multiple of `unit` (the last one what is left), merged, fp32.

    `watch` gives what sees all rows of the tensor as it is read, or None; experts in 4 bit are not read in its order.
    Raises ExportError where an adapter that is not zero has changed nothing of its expert.
    """
    see = watch(part.entry) if part.quantized is None and part.scales is None else None
    if part.piece.expert is not None:
        yield from _of_one(part, part.piece.expert, unit, device, reading, see)
        return
    for first in range(0, part.shape[0], unit):
        experts = range(first, min(part.shape[0], first + unit))
        whole = [[*_of_one(part, expert, 0, device, reading, see)] for expert in experts]
        yield torch.cat([blocks[0][None] for blocks in whole])


def _of_one(
    part: ExpertPart, expert: int, unit: int, device: torch.device, reading: Reading, see: See | None
) -> Generator[Tensor, None, None]:
    """Merged rows of one expert, in blocks; with `unit` 0 all of them, as the tensor has them."""
    first, last = part.rows
    low_RI, high_OR = _matrices(part, expert, device, reading)
    moves = bool(low_RI.any()) and bool(high_OR[first:last].any())
    columns, changed = part.shape[2], False
    step = last - first if unit == 0 else max(1, VALUES_PER_BLOCK // max(1, unit * columns)) * unit
    spans = [(start, min(last - first, start + step)) for start in range(0, last - first, step)]
    with closing(_base_blocks(part, expert, spans, device, reading, see)) as blocks:
        for (start, end), block in zip(spans, blocks, strict=True):
            before = block.to(device, torch.float32)
            merged = torch.addmm(before, high_OR[first + start : first + end], low_RI, alpha=part.adapter.scale)
            changed = changed or not torch.equal(before, merged)
            yield merged.t() if part.transposed else merged
    if moves and not changed:
        what = f"{part.adapter.a.file}: the adapter of expert {expert} of {part.parameter} changes nothing of it"
        raise ExportError(what, "report this base: its experts would be exported without what they learned")


def _matrices(part: ExpertPart, expert: int, device: torch.device, reading: Reading) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of one expert, fp32: rows one after the other, and columns with a stride."""
    lora = part.adapter
    low_RI = read_tensor(lora.a, (expert * lora.rank, (expert + 1) * lora.rank))
    if part.parameter not in reading.columns:
        _make_room(reading.columns)
        reading.columns[part.parameter] = read_tensor(lora.b)
    high_OR = reading.columns[part.parameter][:, expert :: lora.count]
    return low_RI.to(device, torch.float32), high_OR.to(device, torch.float32)


def _base_blocks(
    part: ExpertPart,
    expert: int,
    spans: list[tuple[int, int]],
    device: torch.device,
    reading: Reading,
    see: See | None,
) -> Generator[Tensor, None, None]:
    """What is added to, (rows, in): as it is stored, or bf16 where training had it in 4 bit."""
    if part.quantized is not None:
        slab, first = _coded(part, expert, device, reading), part.rows[0]
        yield from (slab.read_rows(first + start, first + end, torch.bfloat16) for start, end in spans)
    elif part.scales is not None:
        codes, scales = (read_tensor(entry, (expert, expert + 1)) for entry in (part.entry, part.scales))
        yield mxfp4.decoded(codes, scales, torch.bfloat16)[0]
    elif part.piece.expert is None:
        whole = read_tensor(part.entry, (expert, expert + 1))
        if see is not None:
            see(whole)
        yield whole[0].t() if part.transposed else whole[0]
    else:
        with closing(read_ahead(part.entry, spans, see, reading.cache)) as blocks:
            yield from blocks


def _coded(part: ExpertPart, expert: int, device: torch.device, reading: Reading) -> Slab:
    """One expert as training held it, all of its parts: its nested constants are over all of them."""
    key = (part.parameter, expert)
    if key not in reading.codes:
        _make_room(reading.codes)
        assert part.quantized is not None, "an expert that is merged on its original values"
        slab = Slab((1, *part.shape[1:]), part.quantized)
        fill(slab, lambda _: _rows_of(part, expert), device)
        reading.codes[key] = slab
    return reading.codes[key]


def _rows_of(part: ExpertPart, expert: int) -> Callable[[int, int], Tensor]:
    """A function from `start` and `end` to these rows of an expert, (rows, in), in bf16 as they were quantized."""
    if part.piece.expert is None:
        whole = read_tensor(part.entry, (expert, expert + 1))[0]
        matrix = whole.t() if part.transposed else whole
        return lambda start, end: matrix[start:end].to(torch.bfloat16)
    share = part.shape[1] // part.piece.parts

    def read(start: int, end: int) -> Tensor:
        taken = []
        for number, entry in enumerate(part.siblings):  # gate's rows, then up's
            first, last = max(start, number * share), min(end, (number + 1) * share)
            if first < last:
                taken.append(read_tensor(entry, (first - number * share, last - number * share)))
        return torch.cat(taken).to(torch.bfloat16)

    return read


def _make_room(kept: dict[Any, Any]) -> None:
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]
