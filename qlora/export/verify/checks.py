"""Each artifact inspected where it lies, before it gets its name: weights, tokens, ends, and how near it is.

`weights` finds what holds, `fidelity` how near the trained model it is; here both inspect each kind of artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from qlora.errors import ExportError
from qlora.events import Sink
from qlora.export.gguf.lora import expected_matrices
from qlora.export.gguf.plan import GgufPlan
from qlora.export.gguf.probes import PROBE_TEXTS, Limit, comparable
from qlora.export.llama_cpp import runtime
from qlora.export.merge.merge import Merge
from qlora.export.verify import candidates, weights
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference
from qlora.export.verify.weights import Check
from qlora.model.adapter_folder import Adapter, read_adapter
from qlora.model.meta_model import build
from qlora.model.resolve import resolve
from qlora.model.tensors import read_tensor, total_bytes

_HINT = "export again; if it happens again, report it with this line"


@dataclass(frozen=True)
class Inspection:
    """What was found of one artifact. `fidelity` is None for an adapter alone, which is not measured."""

    checks: tuple[Check, ...]
    fidelity: Fidelity | None = None


def inspect_folder(
    reference: TrainedReference, merge: Merge, folder: Path, of_weights: Sequence[Check], sink: Sink
) -> Inspection:
    """A folder of safetensors. Raises ExportError naming the first check that fails."""
    checks = [*of_weights, *weights.check_companions(merge, folder, reference.chat.end_ids)]
    weights.require(folder, checks)
    written = resolve(str(folder), "main", sink)
    meta_model, size = build(written), total_bytes(written.tensors.values())
    line = reference.measure_weights("hf", candidates.of_folder(meta_model, written), size, meta_model)
    return Inspection(tuple(checks), line)


def inspect_gguf(
    reference: TrainedReference, plan: GgufPlan, file: Path, name: str, of_weights: Sequence[Check]
) -> Inspection:
    """A GGUF file, called `name` in the table: through llama.cpp where one is installed, else through transformers.

    Raises ExportError naming the first check that fails.
    """
    checks = list(of_weights)
    weights.require(file, checks)
    found, size = runtime.find_runtime(), file.stat().st_size
    if found is None:
        checks.append(Check("llama.cpp", True, 'not asked: pip install "qlora[gguf]" brings one'))
        source, stored = reference.source, candidates.of_gguf(file, plan.layout.tensors)
        weights_of = candidates.with_experts(stored, source.meta_model, source.base)
        line = reference.measure_weights(name, weights_of, size)
        return Inspection(tuple(checks), line)
    rows = reference.positions.documents()
    texts = tuple(comparable(PROBE_TEXTS, plan.vocab.limits, plan.vocab.specials))
    add_special = not {Limit.PLAIN_TEXT, Limit.OPENING} & set(plan.vocab.limits)
    with runtime.ask(found, file, runtime.Request(texts=texts, add_special=add_special, rows=rows)) as answer:
        checks += weights.check_answer(answer, reference.chat.end_ids, plan.vocab.chat_template)
        checks.append(weights.check_tokens(answer, texts, reference.chat.tokenizer, add_special))
        weights.require(file, checks)
        line = reference.measure(name, found.name, [answer.logprobs_NV], size)
    return Inspection(tuple(checks), line)


def inspect_combined(adapter: Adapter, folder: Path) -> Inspection:
    """A combined adapter as it was written: every value is there, and the one that was meant. Raises ExportError."""
    written = read_adapter(folder)
    same = written.tensors.keys() == adapter.tensors.keys() and all(
        bool((read_tensor(entry) == read_tensor(adapter.tensors[name])).all())
        for name, entry in written.tensors.items()
    )
    if not same:
        raise ExportError(f"{folder}: is not the adapter that was combined", _HINT)
    return Inspection((Check("weights", True, f"{len(written.tensors)} matrices as combined"),))


def inspect_adapter(adapter: Adapter, plan: GgufPlan, file: Path) -> Inspection:
    """An adapter file: every matrix is there, finite, and the one that was meant. Raises ExportError otherwise."""
    stored = {entry.name: entry for entry in gguf.GGUFReader(file).tensors}
    expected = 0
    for name, matrix in expected_matrices(adapter, plan.layout):
        expected += 1
        there = stored.get(name)
        if there is None or not np.array_equal(there.data, matrix.numpy()) or not np.isfinite(there.data).all():
            raise ExportError(f"{file}: {name} is missing, damaged or not finite", _HINT)
    if len(stored) != expected:
        raise ExportError(f"{file}: holds {len(stored)} tensors, not {expected}", _HINT)
    return Inspection((Check("weights", True, f"{expected} matrices as trained"),))
