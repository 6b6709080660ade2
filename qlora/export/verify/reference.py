"""The trained model, computed with once before it is exported: what it predicts, and which channels its rows use.

Loaded is what training had, the base in 4 bit with the adapter beside it. Its predictions are kept as the reference
that every export is measured against, and it is released before a weight is merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.data.chat import ChatFormat
from qlora.data.judged_splits import with_packing
from qlora.data.loader import collate
from qlora.device import release
from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export import base_check
from qlora.export.artifacts import Source
from qlora.export.base_content import BaseContent
from qlora.export.imatrix import Imatrix, choose_packs, collect
from qlora.export.merge.parts import MergeBase
from qlora.export.verify import candidates, evaluation, fidelity
from qlora.export.verify.choice import Choice, MeasuredBase
from qlora.export.verify.evaluation import ComparedLoss
from qlora.export.verify.fidelity import Fidelity, Positions, Reference
from qlora.model import adapters, load, precision
from qlora.model.meta_model import MetaModel
from qlora.model.tokenizer import open_tokenizer
from qlora.model.tokenizer_files import of_export
from qlora.third_party import import_bitsandbytes

TRANSFORMERS = "transformers, bf16"
# Positions of a foreign adapter's probe texts are short; a pack of them is as long as most models' windows.
PROBE_LENGTH = 512


@dataclass
class TrainedReference:
    """What is known of the trained model, and the table of what was measured against it.

    `content` is the base's; `predictions` is None without verification, `imatrix` unless asked
    for, `evaluation` (the loss of the run's rows beside the one that it delivered) where there is nothing to compare,
    `choice` (of the merge base) where there was none.
    """

    source: Source
    chat: ChatFormat
    content: BaseContent
    predictions: Reference | None = None
    imatrix: Imatrix | None = None
    evaluation: ComparedLoss | None = None
    choice: Choice | None = None
    table: list[Fidelity] = field(default_factory=list)

    @property
    def texts(self) -> str:
        """Whose rows are measured on, in words."""
        return "" if self.predictions is None else self.positions.source

    @property
    def positions(self) -> Positions:
        """Where it is measured; asked for under verification only."""
        assert self.predictions is not None
        return self.predictions.positions

    def measure_merge(self, merge_base: MergeBase) -> MeasuredBase:
        """How near and how good the model merged on `merge_base` is, in bf16, its weights merged as they are needed."""
        merged = candidates.of_merge(self.source.merge(merge_base, torch.bfloat16).tensors())
        weights = candidates.with_experts(merged, self.source.meta_model, self.source.base)
        losses: list[torch.Tensor] = []
        line = self.measure_weights(f"merged on {merge_base}", weights, None, losses=losses)
        return MeasuredBase(line.kl, torch.cat(losses))

    def measure_weights(
        self,
        name: str,
        weights: candidates.Weights,
        size: int | None,
        meta_model: MetaModel | None = None,
        losses: list[torch.Tensor] | None = None,
    ) -> Fidelity:
        """How near a model with these weights is, computed by transformers; `meta_model` is the base's by default."""
        # A copy: computing moves the buffers, and some models change them.
        model = copy.deepcopy((meta_model or self.source.meta_model).model)
        chunks = candidates.vocabulary_logprobs(model, weights, self.positions.batches, self.source.device)
        return self.measure(name, TRANSFORMERS, chunks, size, losses)

    def measure(
        self,
        name: str,
        by: str,
        chunks: Iterable[torch.Tensor | np.ndarray],
        size: int | None,
        losses: list[torch.Tensor] | None = None,
    ) -> Fidelity:
        """Measure log-probabilities against the trained model's, and keep the line; `losses` gets each position's."""
        assert self.predictions is not None
        line = fidelity.measure(self.predictions, name, by, chunks, size, losses)
        self.table.append(line)
        return line


@contextmanager
def trained_reference(
    source: Source, verify: bool, imatrix: bool, sink: Sink, scratch: Path
) -> Iterator[TrainedReference]:
    """Compute with the trained model as far as it is needed; `scratch` holds what it predicts while the block runs."""
    rows = source.rows
    tokenizer = rows.chat.tokenizer if rows else _tokenizer_alone(source)
    chat = ChatFormat.of(tokenizer)
    if not verify and not imatrix:
        yield TrainedReference(source, chat, BaseContent(source, sink))
        return
    if imatrix and rows is None:
        raise ExportError("`imatrix` needs the rows of a run", "name a run's folder whose data files are still there")
    import_bitsandbytes()
    release(source.device)  # a run's model may still be held by what refers to itself
    dtype = precision.of_saved(source.adapter.folder, source.device)
    how = (source.origin.quantization, "auto", source.device, sink)
    model = load.load_base(source.base, *how, dtype=dtype)
    base_check.refuse_another(source, model.base_identity)
    if model.base_was_kept:  # a merge reads the base's own files, of which samples alone were looked at
        base_check.read_through(source, sink)
    reference = TrainedReference(source, chat, BaseContent(source, sink, model.base_identity))
    model = adapters.open_saved(model, source.adapter.folder)
    if imatrix and rows is not None:  # from its training rows; from evaluation rows where these are all there are
        split, packs = choose_packs((rows.data.train, rows.data.eval), rows.section)
        # 44 bytes a token on the host, 6 MB for MAX_TOKENS.
        batches = [collate(split, [members], rows.chat.pad_id, rows.section.max_length) for members in packs]
        reference.imatrix = collect(model, batches, sink)
    if not verify:
        del model
        release(source.device)
        yield reference
        return
    reference.evaluation = _compare_loss(source, model, sink)
    positions = _positions(source, tokenizer, model, sink)
    chunks = fidelity.live_logprobs(model, positions.batches, source.device)
    with fidelity.reference(chunks, positions, scratch) as predictions:
        del model, chunks
        release(source.device)
        reference.predictions = predictions
        quantization = source.origin.quantization.type
        name = "trained" if quantization == "none" else f"trained, adapter on {quantization}"
        by = TRANSFORMERS if dtype == torch.bfloat16 else "transformers, fp16"
        reference.measure(name, by, [predictions.logprobs_NV], None)
        yield reference


def _tokenizer_alone(source: Source) -> Any:
    """The tokenizer of an adapter that brings no rows."""
    with of_export(source.base.path, source.adapter.folder).placed() as folder:
        return open_tokenizer(folder, source.base.name)


def _compare_loss(source: Source, model: Any, sink: Sink) -> ComparedLoss | None:
    """The second net under the base's identity: does the model that is here know what was learned?"""
    if source.delivered is None:
        return None
    if source.rows is None:
        message = "without the run's evaluation rows, the trained model's loss is not compared with what was delivered"
        sink.emit(Notice("verify", message))
        return None
    section = source.rows.section.model_copy(update={"packing": source.delivered.packing})
    split = with_packing(source.rows.data.eval, section.packing)
    rows = evaluation.EvalRows(split, section, source.rows.chat.pad_id, source.delivered.packs_at_once)
    return evaluation.compare(model, rows, source.delivered, sink)


def _positions(source: Source, tokenizer: Any, model: Any, sink: Sink) -> Positions:
    vocabulary = model.get_base_model().get_output_embeddings().weight.shape[0]
    if (rows := source.rows) is not None and any(rows.data.eval.trained):
        layout = (rows.section.max_length, rows.section.packing)
        return fidelity.choose_positions(rows.data.eval, layout, rows.chat.pad_id, vocabulary)
    sink.emit(Notice("verify", "there are no evaluation rows: exports are measured on built-in probe texts"))
    split = fidelity.probe_split(tokenizer, PROBE_LENGTH)
    if max(max(row.input_ids) for row in split.rows) >= vocabulary:
        what = f"{source.adapter.folder}: its tokenizer has tokens beyond the model's {vocabulary:,} rows"
        raise ExportError(what, "save the adapter with the tokenizer that it was trained with")
    pad = tokenizer.pad_token_id or 0  # pads are masked by place, never by id
    pad_id = pad if pad < vocabulary else 0
    return fidelity.choose_positions(split, (PROBE_LENGTH, False), pad_id, vocabulary, fidelity.PROBE_ROWS)
