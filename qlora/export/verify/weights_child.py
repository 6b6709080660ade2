"""Reopens what an export wrote and compares every weight: `python -m qlora.export.verify.weights_child REQUEST.json`.

A process of its own, because a damaged file may take down the one that reads it. It goes over the base once more, in
blocks of rows, and knows by itself what must stand in the files: base + scale · B A, written out here a second time, so
that a merge that forgot a module or added it twice is seen. (DoRA, whole weights, token rows are taken from `merge`.)

F32, F16 and BF16 must hold each value, rounded once, and bytes (of experts in MXFP4) must be the base's own. Quantized
blocks cannot be compared value by value; what is measured instead is how much of the delta is in them (1 is right, 0
was forgotten, 2 stands in them twice), and how large the whole error is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlora.errors import UserError
from qlora.events import Sinks
from qlora.export import child
from qlora.export.gguf.architectures import Layout, lay_out
from qlora.export.gguf.family import GgufTensor
from qlora.export.merge.merge import Merge, MergedTensor
from qlora.export.merge.parts import expert_pieces, make_plan
from qlora.export.verify import plain_open
from qlora.export.verify.candidates import dequantized_rows, packed_rows
from qlora.export.verify.plain_open import Result
from qlora.model.adapter_folder import read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tensors import TensorEntry, find_tensors, read_tensor
from qlora.recipe.sections import QuantizationSection

_ROUNDED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# Sums of r products in another order, relative to the largest value of a block.
_FP32_NOISE = 1e-6
# Largest error of quantized weights relative to their size, 2.5 times what Gaussian weights show (Q8_0 0.5 %, Q6_K
# 1.8 %, Q5_0 4.3 %, Q4_K 7.1 %, IQ4_XS 7.7 %, MXFP4 11.4 %, Q3_K 15 %). A forgotten permutation makes it 140 %.
_LARGEST_ERROR = {"Q8": 0.02, "Q6": 0.05, "Q5": 0.1, "Q4": 0.2, "IQ4": 0.2, "MXFP4": 0.3, "Q3": 0.4}
# How much of its delta a quantized weight may seem to hold. A right one holds all of it on a base in 16 bit (0.95 to
# 1.06 measured), but on a dequantized NF4 base, whose values stand on a grid themselves, a small delta is partly
# rounded away or enlarged (deltas from 0.15 % to 10 % of the weights: Q8_0 0.99 to 1.16, Q5_0 0.6 to 1.2, Q4_K 0.58 to
# 0.98, IQ4_XS 0.63 to 0.96, Q3_K 0.87 to 1.63).
_SHARES = {"Q8": (0.7, 1.4), "Q6": (0.5, 1.5), "Q5": (0.4, 1.5), "Q4": (0.3, 1.6), "IQ4": (0.3, 1.6), "Q3": (0.3, 1.8)}
_SMALLEST_SUM = 1e-20  # below it squares of fp32 values that matter may have become zeros
_NAMED = 3  # failing tensors that are named


@dataclass
class _Tally:
    """A written tensor, and what was seen of it. Sums are of squares, but `dot`.

    `rows(start, end)` gives fp32 as the file says it, `change` brings other rows, whole `unit`s, to its order. Of the
    parameter, the file holds the rows `taken` (from, up to; None: all) there.
    """

    kind: str
    rows: Callable[[int, int], Tensor]
    change: Callable[[Tensor], Tensor] = lambda rows: rows
    unit: int = 1
    taken: tuple[int, int] | None = None
    changed: bool = False  # by the adapter
    count: int = 0  # of rows that the file holds
    next_rows: tuple[tuple[int, int], Future[Tensor]] | None = None
    values: int = 0
    not_finite: int = 0
    misrounded: int = 0
    error: float = 0.0
    size: float = 0.0
    delta: float = 0.0
    dot: float = 0.0  # of the written delta with the expected one

    def see(self, start: int, expected: Tensor, base: Tensor | None, reading: Executor) -> None:
        end = start + (expected.shape[0] if expected.ndim else 1)
        if self.taken is not None:
            first, last = max(start, self.taken[0]), min(end, self.taken[1])
            if first >= last:
                return
            expected = expected[first - start : last - start]
            base = None if base is None else base[first - start : last - start]
            start, end = first - self.taken[0], last - self.taken[0]
        expected = self.change(expected.float())
        written = self._written(start, end, reading).reshape(expected.shape)
        self.values += written.numel()
        if not _is_finite(written):
            self.not_finite += int((~torch.isfinite(written)).sum())
        error = written - expected
        self.error += _product(error, error)
        self.size += _product(expected, expected)
        if self.kind in _ROUNDED:
            rounded = expected.to(_ROUNDED[self.kind]).float()
            if not torch.equal(rounded, written):
                allowed = (rounded - expected).abs() + _FP32_NOISE * expected.abs().max()
                self.misrounded += int((error.abs() > allowed).sum())
        if base is not None and self.changed:
            base = self.change(base)
            delta = expected - base
            self.delta += _product(delta, delta)
            self.dot += _product(written - base, delta)

    def _written(self, start: int, end: int, reading: Executor) -> Tensor:
        """Rows of the file; `reading` reads as many behind them while these are compared."""
        ahead, self.next_rows = self.next_rows, None
        written = ahead[1].result() if ahead and ahead[0] == (start, end) else self.rows(start, end)
        behind = end, min(2 * end - start, self.count)
        if end < behind[1]:
            self.next_rows = behind, reading.submit(self.rows, *behind)
        return written

    @property
    def share(self) -> float:
        """How much of the delta is in the file; NaN where rounding hides it, or where there was none."""
        known = self.delta and (self.kind in _ROUNDED or self._noise < 0.25)
        return self.dot / self.delta if known else math.nan

    @property
    def wrong_share(self) -> bool:
        """Whether the delta is missing, or in the file more than once."""
        if math.isnan(self.share):
            return False
        low, high = _SHARES.get(self._bits, (0.4, 1.6))
        return not low - self._noise <= self.share <= high + self._noise

    @property
    def holds(self) -> bool:
        if self.kind in _ROUNDED:
            return self.misrounded == 0
        small = math.sqrt(self.error) <= _LARGEST_ERROR.get(self._bits, 0.5) * math.sqrt(self.size)
        return small and not self.wrong_share

    @property
    def _bits(self) -> str:
        return self.kind.partition("_")[0]

    @property
    def _noise(self) -> float:
        """What rounding, independent of the delta, may add to the share: six standard deviations."""
        return 6 * math.sqrt(self.error / self.values / self.delta)


def _is_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN goes through both
    return math.isfinite(low) and math.isfinite(high)


def _product(one: Tensor, other: Tensor) -> float:
    """The sum of products of fp32 values, in fp64 where fp32 has no place for it.

    A block has half a million of them, summed in fp32 to about 1e-5: shares are compared with bounds of a tenth. In
    fp64 throughout, these sums were most of a verification (16 s of a processor for 1.6 GB of bf16).
    """
    found = float(torch.dot(one.reshape(-1), other.reshape(-1)))
    if math.isfinite(found) and abs(found) > _SMALLEST_SUM:
        return found
    if not one.any():
        return 0.0
    return float((one.double() * other.double()).sum())


@dataclass
class _File:
    """An artifact to check: what was found before its weights were compared, and its tensors by parameter and name."""

    results: list[Result]
    tallies: dict[tuple[str, str], _Tally] = field(default_factory=dict)

    def conclude(self) -> list[Result]:
        """The results with those over weights."""
        if not self.tallies:
            return self.results
        bad = {name: tally for name, tally in self.tallies.items() if tally.not_finite}
        counted = [f"{name}: {tally.not_finite} of {tally.values:,}" for (name, _), tally in bad.items()]
        self.results.append(("finite", not bad, _summary(counted, f"{len(self.tallies)} tensors")))
        for name, changed in (("deltas", True), ("other weights", False)):
            tallies = {key: tally for key, tally in self.tallies.items() if tally.changed is changed}
            wrong = [_what_is_wrong(key[0], tally) for key, tally in tallies.items() if not tally.holds]
            shares = [tally.share for tally in tallies.values() if not math.isnan(tally.share)]
            spread = f", {min(shares):.3f} to {max(shares):.3f} of each" if shares else ""
            unseen = sum(math.isnan(tally.share) for tally in tallies.values()) if changed else 0
            small = f", {unseen} too small to be told from rounding" if unseen else ""
            self.results.append((name, not wrong, _summary(wrong, f"{len(tallies)} tensors{spread}{small}")))
        return self.results


def _what_is_wrong(name: str, tally: _Tally) -> str:
    if tally.wrong_share:
        return f"{name} holds {tally.share:.2f} of its delta"
    if tally.kind in _ROUNDED:
        return f"{name} differs in {tally.misrounded:,} of {tally.values:,} values"
    return f"{name} differs by {math.sqrt(tally.error / tally.size) if tally.size else math.inf:.0%}"


def _summary(wrong: list[str], otherwise: str) -> str:
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return "; ".join(wrong[:_NAMED]) + more if wrong else otherwise


# --- opening ----------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, merge: Merge, dtype: str) -> _File:
    """A folder of safetensors, of the type `dtype` but for what stays in fp32."""
    planned = {tensor.name: tensor for tensor in replace(merge, dtype=_ROUNDED[dtype]).tensors()}
    names = {kind: name for name, kind in _ROUNDED.items()}
    try:
        found = find_tensors(folder)
    except UserError as error:
        return _File([("opens", False, error.what)])
    wrong = _compare(
        {name: (tensor.shape, names[tensor.dtype]) for name, tensor in planned.items()},
        {name: (entry.shape, entry.dtype) for name, entry in found.items()},
    )
    file = _File([("names, shapes, types", not wrong, _summary(wrong, f"{len(found)} tensors"))])
    if not wrong:
        for name, tensor in planned.items():
            file.tallies[tensor.parameter, name] = _Tally(found[name].dtype, partial(_rows, found[name]))
    return file


def open_gguf(path: Path, layout: Layout, types: Mapping[str, str], keys: Mapping[str, Any]) -> _File:
    """A GGUF file, by the layout that the merged model has."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        return _File([("opens", False, f"its header cannot be read ({error})")])
    planned = {name: (shape, types[name]) for name, shape in layout.stored.items()}
    planned |= {name: (values.shape, "F32") for name, values in layout.constants.items()}
    found = {entry.name: entry for entry in reader.tensors}
    shapes = {name: tuple(map(int, reversed(entry.shape))) for name, entry in found.items()}
    wrong = _compare(planned, {name: (shapes[name], entry.tensor_type.name) for name, entry in found.items()})
    wrong += [
        f"{name} has other values"
        for name, values in layout.constants.items()
        if name in found and not np.array_equal(found[name].data.reshape(values.shape), values)
    ]
    file = _File([("names, shapes, types", not wrong, _summary(wrong, f"{len(found)} tensors")), _keys(reader, keys)])
    if not wrong:
        for tensor in layout.tensors:
            rows = partial(_rows_from, found[tensor.name], tensor)
            taken = None if tensor.place is None else tensor.taken
            kind = types[tensor.name]
            if tensor.packed:
                kind, rows = "U8", partial(packed_rows, found[tensor.name], tensor)
            tally = _Tally(kind, rows, tensor.to_gguf, tensor.unit, taken)
            file.tallies[tensor.parameter, tensor.name] = tally
    return file


def _keys(reader: Any, expected: Mapping[str, Any]) -> Result:
    """Each key that was meant to be written is there, with its value (lists: with its length)."""
    wrong = []
    for key, value in expected.items():
        entry = reader.fields.get(key)
        if entry is None:
            wrong.append(f"{key} is missing")
            continue
        found = len(entry.data) if isinstance(value, dict) else entry.contents()
        wanted = value["length"] if isinstance(value, dict) else value
        same = math.isclose(found, wanted, rel_tol=1e-6) if isinstance(wanted, float) else found == wanted
        if not same:
            wrong.append(f"{key} is {str(found)[:40]!r}, not {str(wanted)[:40]!r}")
    return "keys", not wrong, _summary(wrong, f"{len(expected)} keys")


def _compare(planned: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    wrong = [f"{name} is missing" for name in planned if name not in found]
    wrong += [f"{name} does not belong in it" for name in found if name not in planned]
    for name, (shape, kind) in planned.items():
        if name in found and found[name] != (shape, kind):
            wrong.append(f"{name} is {found[name][1]} {list(found[name][0])}, not {kind} {list(shape)}")
    return wrong


def _rows_from(entry: Any, tensor: GgufTensor, start: int, end: int) -> Tensor:
    first, last = (tensor.at + tensor.matrix_rows(count) for count in (start, end))
    return dequantized_rows(entry, first, last)


def _rows(entry: TensorEntry, start: int, end: int) -> Tensor:
    return read_tensor(entry, (start, end) if entry.shape else None).float()


# --- the pass over the weights ----------------------------------------------------------------------------------------


def compare_weights(merge: Merge, files: list[_File]) -> None:
    """Goes over every tensor once, in blocks of rows, and lets each file that opened see what it should hold."""
    opened = [file.tallies for file in files if file.tallies]
    if not opened:
        return
    by_parameter: dict[str, list[_Tally]] = {}
    for of_file in opened:
        for (parameter, _), tally in of_file.items():
            by_parameter.setdefault(parameter, []).append(tally)
    with ThreadPoolExecutor(1, thread_name_prefix="written") as reading:
        _compare_all(replace(merge, dtype=torch.float32), by_parameter, reading)


def _compare_all(exact: Merge, by_parameter: Mapping[str, list[_Tally]], reading: Executor) -> None:
    base = {tensor.parameter: tensor for tensor in exact.base_tensors()}
    changed = frozenset(exact.changed)
    for tensor in exact.tensors():
        name, start = tensor.parameter, 0
        tallies = by_parameter[name]
        for tally in tallies:
            tally.changed = name in changed
            whole = tensor.shape[0] if tensor.shape else 1
            tally.count = whole if tally.taken is None else tally.taken[1] - tally.taken[0]
        unit = math.lcm(*(tally.unit for tally in tallies))
        for expected, before in _expected(exact, tensor, base.get(name), unit):
            for tally in tallies:
                tally.see(start, expected, before, reading)
            start += expected.shape[0] if expected.ndim else 1


def _expected(
    merge: Merge, tensor: MergedTensor, before: MergedTensor | None, unit: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of the merged weight and of the base's (None where that has none of the same shape), fp32."""
    adapter, name = merge.adapter, tensor.parameter
    lora = adapter.lora.get(name)
    others = adapter.whole.keys() | adapter.under.keys() | adapter.rows.keys()
    if before is None or before.shape != tensor.shape:
        yield from ((block, None) for block in tensor.blocks(unit))
    elif lora is not None and lora.magnitude is None and not lora.embedding and name not in others:
        a_RI, b_OR = read_tensor(lora.a).float(), read_tensor(lora.b).float()
        start = 0
        for block in before.blocks(unit):
            yield torch.add(block, b_OR[start : start + len(block)] @ a_RI, alpha=lora.scale), block
            start += len(block)
    elif name in merge.changed:
        yield from side_by_side(tensor.blocks(unit), before.blocks(unit))
    else:
        yield from ((block, block) for block in before.blocks(unit))


def side_by_side(merged: Iterable[Tensor], base: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of `merged`, and as many rows of `base`, which comes in blocks of its own (experts are merged singly)."""
    coming = iter(base)
    held: list[Tensor] = []
    for block in merged:
        if not block.ndim:
            yield block, next(coming)
            continue
        while sum(map(len, held)) < len(block):
            held.append(next(coming))
        rows = held[0] if len(held) == 1 else torch.cat(held)
        yield block, rows[: len(block)]
        held = [rows[len(block) :]] if len(rows) > len(block) else []


def main(request_file: Path) -> int:
    """Answer a request: the results of each file, or why none could be had, as answer.json beside it."""
    try:
        answer: dict[str, Any] = {"results": _results(child.read_request(request_file))}
    except UserError as error:
        answer = {"failed": error.what}
    child.write_answer(request_file, answer)
    return 0


def _results(request: Mapping[str, Any]) -> list[list[Result]]:
    base = resolve(request["base"], "main", Sinks())
    meta_model, adapter = build(base), read_adapter(Path(request["adapter"]))
    merge_base, quantization = request["merge_base"], QuantizationSection(**request["quantization"])
    plan = make_plan(base, meta_model, adapter, merge_base, quantization)
    merge = Merge(base, adapter, merge_base, quantization, torch.device(request["device"]), plan)
    files = []
    for target in request["targets"]:
        path = Path(target["path"])
        if target["dtype"]:
            files.append(open_folder(path, merge, target["dtype"]))
            files[-1].results.append(plain_open.opens(path))
        else:
            shapes = {tensor.parameter: tensor.shape for tensor in merge.tensors()}
            layout = lay_out(meta_model.model, shapes, expert_pieces(base, meta_model))
            files.append(open_gguf(path, layout, target["types"], target["keys"]))
    compare_weights(merge, files)
    return [file.conclude() for file in files]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
