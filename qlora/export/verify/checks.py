"""Each product looked at where it lies, before it gets its name: its weights, its tokens and ends, and how near it is.

`verify` says what holds, `fidelity` how near; here they are asked about each kind of product. Weights of all files are
compared in one pass over the base.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from qlora.export.verify import streamed, weights
from qlora.export.verify.fidelity import Fidelity
from qlora.export.verify.reference import TrainedReference
from qlora.export.verify.weights import Check, Target, Verified
from qlora.model.adapter_folder import Adapter
from qlora.model.resolve import resolve

_HINT = "export again; if it happens again, report it with this line"


@dataclass(frozen=True)
class Inspection:
    """What was found of one product. `fidelity` is None where nothing was measured."""

    checks: tuple[Check, ...]
    fidelity: Fidelity | None = None


def reopen(merge: Merge, targets: Mapping[str, Target]) -> dict[str, Verified]:
    """The weights of each product against what must stand in them, by product."""
    if not targets:
        return {}
    return dict(zip(targets, weights.reopen(merge, list(targets.values())), strict=True))


def inspect_folder(study: TrainedReference, merge: Merge, folder: Path, verified: Verified, sink: Sink) -> Inspection:
    """A folder of safetensors. Raises ExportError naming the first thing that does not hold."""
    checks = [*verified.checks, *weights.check_companions(merge, folder, study.voice.end_ids)]
    Verified(folder, tuple(checks)).require()
    line = None
    if study.reference is not None:
        written = resolve(str(folder), "main", sink)
        size = sum(entry.nbytes for entry in written.tensors.values())
        line = study.measure_folder("hf", written, size)
    return Inspection(tuple(checks), line)


def inspect_gguf(study: TrainedReference, plan: GgufPlan, file: Path, name: str, verified: Verified) -> Inspection:
    """A GGUF file, called `name` in the table: through llama.cpp where one is installed, else through transformers.

    Raises ExportError naming the first thing that does not hold.
    """
    checks = list(verified.checks)
    Verified(file, tuple(checks)).require()
    found, size = runtime.find_runtime(), file.stat().st_size
    if found is None:
        checks.append(Check("llama.cpp", True, 'not asked: pip install "qlora[gguf]" brings one'))
        if study.reference is None:
            return Inspection(tuple(checks))
        return Inspection(tuple(checks), study.measure_weights(name, streamed.of_gguf(file, plan.layout.tensors), size))
    rows = study.reference.positions.documents() if study.reference is not None else []
    texts = tuple(comparable(PROBE_TEXTS, plan.vocab.limits, plan.vocab.specials))
    add_special = Limit.PLAIN_TEXT not in plan.vocab.limits
    with runtime.ask(found, file, runtime.Request(texts=texts, add_special=add_special, rows=rows)) as answer:
        checks += weights.check_answer(answer, study.voice.end_ids, plan.vocab.chat_template)
        checks.append(weights.check_tokens(answer, texts, study.voice.tokenizer, add_special))
        Verified(file, tuple(checks)).require()
        line = None
        if study.reference is not None:
            line = study.measure(name, found.name, [answer.logprobs_NV], size)
    return Inspection(tuple(checks), line)


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
