"""Where experts lie in a checkpoint: a tensor an expert and matrix, or one of all experts, by transformers' table.

A projection is one 3-D parameter in memory. On the disk most families have a tensor for each expert, gate and up apart
(`mlp.experts.3.gate_proj.weight`, `block_sparse_moe.experts.3.w1.weight`); some have the parameter as it is. What
transformers would stack and concatenate when it opens the base tells which piece of which parameter a tensor is. In
MXFP4 a projection has two tensors, codes and scales, of which that table says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import ModelError
from qlora.model.mxfp4 import FORMS, stored_shape
from qlora.model.tensors import TensorEntry
from qlora.step.experts import Plain

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
# What transformers does to stack a list of experts, and to put gate and up above each other in each of them.
_STACKS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
_OTHERS = "config.json and weights are of different models; get a clean copy"
_CLEAN_COPY = "download the model again, or ask who published it for a clean copy"


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, and what of a projection it is: an expert's rows, the `part`th of `parts` equal
    shares of them, or all experts (`expert` None) as the parameter has them. `form`: of MXFP4, one of FORMS."""

    tensor: str
    expert: int | None
    part: int = 0
    parts: int = 1
    form: str = ""

    @property
    def in_words(self) -> str:
        """Which expert it is, and what of it."""
        if self.form:
            return f"the {self.form} in MXFP4"
        if self.expert is None:
            return "all experts"
        share = f", part {self.part + 1} of {self.parts}" if self.parts > 1 else ""
        return f"expert {self.expert}{share}"


def piece_of(name: str, plain: str, pattern: str, converters: Iterable[Any]) -> Piece | None:
    """The piece that a tensor is whose renamed name matched `pattern` of one of transformers' `converters`; None where
    transformers would make another thing of it. `plain` is its name in the text model, before transformers' renamings.
    """
    found = [one for one in converters if pattern in one.source_patterns]
    number = _EXPERT.search(plain)
    if len({tuple(one.source_patterns) for one in found}) != 1 or number is None:
        return None
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in found[0].operations]
    parts = len(found[0].source_patterns)
    if steps not in _STACKS or len(found[0].target_patterns) != 1 or (len(steps) == 1) != (parts == 1):
        return None
    return Piece(name, int(number[1]), found[0].source_patterns.index(pattern), parts)


def form_of(name: str) -> tuple[str, str]:
    """Which of FORMS a tensor is by its name, "" for none, and the name without that end."""
    form = next((form for form in FORMS if name.endswith(f"_{form}")), "")
    return form, name.removesuffix(f"_{form}") if form else name


def _packed_pair(where: str, parameter: str, stated: bool, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The codes and the scales of a projection in MXFP4, each there once; `stated`: config.json says that it is in it.

    Raises ModelError naming what is missing or there twice, and where config.json and tensors say different things.
    """
    plain = [piece for piece in pieces if not piece.form]
    packed = [piece for piece in pieces if piece.form]
    if plain and packed:
        raise ModelError(f"{where}: {plain[0].tensor} and {packed[0].tensor} hold the same experts", _CLEAN_COPY)
    if bool(packed) is not stated:
        says, of = ("MXFP4", pieces[0].tensor) if stated else ("16 bit", packed[0].tensor)
        stored = "in MXFP4" if packed else "not stored so"
        what = f"{where}: config.json says that {parameter} is in {says}, but {of} is {stored}"
        raise ModelError(what, _OTHERS)
    found = [[piece for piece in packed if piece.form == form] for form in FORMS]
    for form, of_form in zip(FORMS, found, strict=True):
        if len(of_form) > 1:
            what = f"{where}: {of_form[0].tensor} and {of_form[1].tensor} are both the {form} of {parameter}"
            raise ModelError(what, _CLEAN_COPY)
        if not of_form:
            raise ModelError(f"{where}: {parameter}: the {form} in MXFP4 are missing ({parameter}_{form})", _CLEAN_COPY)
    return tuple(of_form[0] for of_form in found)


def check_piece(where: str, entry: TensorEntry, piece: Piece, parameter: str, module: Any) -> None:
    """Raises ModelError for a tensor of experts that is not the shape of its share of the parameter."""
    leaf = parameter.rpartition(".")[2]
    shape = tuple(getattr(module, leaf).shape)
    expected = shape if piece.expert is None else (shape[1] // piece.parts, *shape[2:])
    if piece.form:
        expected = stored_shape(Plain(module, leaf).shape, piece.form)
    if entry.shape != expected:
        raise another_shape(where, piece.tensor, entry.shape, f"{piece.in_words} of {parameter}", expected)
    if piece.form and entry.dtype != "U8":
        what = f"{where}: {piece.tensor} is stored as {entry.dtype}, but {piece.in_words} are bytes (U8)"
        raise ModelError(what, _OTHERS)


def another_shape(
    where: str, tensor: str, stored: tuple[int, ...], parameter: str, expected: tuple[int, ...]
) -> ModelError:
    """For a tensor that is not as large as config.json makes its parameter."""
    what = f"{where}: {tensor} is {list(stored)}, but the configuration makes {parameter} {list(expected)}"
    return ModelError(what, _OTHERS)


def in_order(
    where: str, parameter: str, count: int, pieces: Sequence[Piece], in_mxfp4: bool = False
) -> tuple[Piece, ...]:
    """The pieces of a projection of `count` experts, sorted, each there once.

    `where` is the base's name, `in_mxfp4` what config.json says. Raises ModelError naming what is missing or there
    twice.
    """
    if in_mxfp4 or any(piece.form for piece in pieces):
        return _packed_pair(where, parameter, in_mxfp4, pieces)
    whole = [piece for piece in pieces if piece.expert is None]
    if whole and len(pieces) > 1:
        other = next(piece for piece in pieces if piece is not whole[0])
        raise ModelError(f"{where}: {whole[0].tensor} and {other.tensor} hold the same expert", _CLEAN_COPY)
    if whole:
        return tuple(whole)
    parts = pieces[0].parts
    found: dict[tuple[int, int], Piece] = {}
    for piece in pieces:
        key = (piece.expert or 0, piece.part)
        if (before := found.get(key)) is not None:
            what = f"{where}: {before.tensor} and {piece.tensor} are both {piece.in_words} of {parameter}"
            raise ModelError(what, _CLEAN_COPY)
        found[key] = piece
    wanted = [(expert, part) for expert in range(count) for part in range(parts)]
    if beyond := found.keys() - wanted:
        what = f"{where}: {found[min(beyond)].tensor} is of an expert beyond the {count} of config.json"
        raise ModelError(what, _OTHERS)
    if lost := [key for key in wanted if key not in found]:
        missing = Piece("", *lost[0], parts).in_words
        more = f", and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise ModelError(f"{where}: {parameter}: {missing} is missing{more}", _CLEAN_COPY)
    return tuple(found[key] for key in wanted)
