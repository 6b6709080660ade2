"""The trained model, looked at once before it is exported: what it predicts, and which channels its rows use.

Loaded is what training had, the base in 4 bit with the adapter beside it. Its predictions are kept as the reference
that every export is measured against, and it is let go of again before a weight is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora.data.template import ChatTemplate
from qlora.device import release_memory
from qlora.errors import ExportError, TokenizerError
from qlora.events import Notice, Sink, Sinks
from qlora.export.artifacts import Source
from qlora.export.imatrix import Imatrix, choose_packs, collect, make_batches
from qlora.export.merge.merge import MergeBase
from qlora.export.verify import fidelity, streamed
from qlora.export.verify.fidelity import Fidelity, Positions, Reference
from qlora.export.verify.streamed import Compute
from qlora.model import adapters, load
from qlora.model.meta_model import build
from qlora.model.tokenizer import open_tokenizer
from qlora.third_party import import_bitsandbytes

TRANSFORMERS = "transformers, bf16"
# Positions of a foreign adapter's probe texts are short; a pack of them is as long as most models' windows.
PROBE_LENGTH = 512


@dataclass(frozen=True)
class ChatFormat:
    """How the trained model reads and stops: its tokenizer and chat template, and the ids that end an answer."""

    tokenizer: Any
    template: ChatTemplate | None
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, source: Source) -> ChatFormat:
        """The run's, or what the adapter's folder and its base tell. A base without an end token has no template."""
        if source.rows is not None:
            tokenizer = source.rows.chat.tokenizer
        else:
            tokenizer = open_tokenizer(source.base.path, source.base.name, source.adapter.folder)
        try:
            template = ChatTemplate(tokenizer, Sinks())
        except TokenizerError:
            return cls(tokenizer, None, ())
        return cls(tokenizer, template, tuple(tokenizer.convert_tokens_to_ids(template.end_tokens)))


@dataclass
class TrainedReference:
    """What is known of the trained model. `reference` is None without verification, `imatrix` unless asked for."""

    source: Source
    sink: Sink
    voice: ChatFormat
    reference: Reference | None = None
    imatrix: Imatrix | None = None
    table: list[Fidelity] = field(default_factory=list)

    @property
    def texts(self) -> str:
        """Whose rows are measured on, in words."""
        return "" if self.reference is None else self.reference.positions.source

    def measure_merge(self, merge_base: MergeBase) -> Fidelity:
        """How near the model merged on `merge_base` is, in bf16, its weights merged as they are needed."""
        weights = streamed.of_merge(self.source.merge(merge_base, torch.bfloat16).tensors())
        return self.measure(f"merged on {merge_base}", TRANSFORMERS, self._computed(weights), None)

    def measure_folder(self, name: str, folder: Any, size: int) -> Fidelity:
        """How near the model in a written folder of safetensors (a BaseFolder) is."""
        meta_model = build(folder)
        weights = streamed.of_folder(meta_model, folder)
        return self.measure(name, TRANSFORMERS, self._computed(weights, meta_model.model), size)

    def measure_weights(self, name: str, weights: streamed.Weights, size: int) -> Fidelity:
        """How near a model with these weights is, computed by transformers."""
        return self.measure(name, TRANSFORMERS, self._computed(weights), size)

    def measure(self, name: str, by: str, chunks: Any, size: int | None) -> Fidelity:
        """Measure log-probabilities against the reference, and keep the line."""
        assert self.reference is not None
        line = fidelity.measure(self.reference, name, by, chunks, size)
        self.table.append(line)
        return line

    def _computed(self, weights: streamed.Weights, model: Any = None) -> Iterator[torch.Tensor]:
        assert self.reference is not None
        model = build(self.source.base).model if model is None else model
        return streamed.vocabulary_logprobs(
            model, weights, self.reference.positions.batches, Compute(self.source.device)
        )


@contextmanager
def study(source: Source, verify: bool, imatrix: bool, sink: Sink, scratch: Path) -> Iterator[TrainedReference]:
    """Look at the trained model as far as it is needed; `scratch` holds the reference while the block runs."""
    found = TrainedReference(source, sink, ChatFormat.of(source))
    if not verify and not imatrix:
        yield found
        return
    if imatrix and source.rows is None:
        raise ExportError("--imatrix needs the rows of a run", "name a run's folder whose data files are still there")
    model = trained_model(source, sink)
    if imatrix:
        found.imatrix = _importance(source, model, sink)
    if not verify:
        del model
        yield found
        return
    positions = _positions(found, model)
    chunks = fidelity.live_logprobs(model, positions.batches, source.device)
    with fidelity.reference(chunks, positions, scratch) as reference:
        del model, chunks
        release_memory(source.device)
        found.reference = reference
        held = source.origin.quantization.type
        found.measure(
            "trained" if held == "none" else f"trained, adapter on {held}",
            TRANSFORMERS,
            [reference.logprobs_NV],
            None,
        )
        yield found


def trained_model(source: Source, sink: Sink) -> Any:
    """The base as training held it, with the adapter on it."""
    import_bitsandbytes()
    model = load.load_base(source.base, source.origin.quantization, "auto", source.device, sink)
    return adapters.open_saved(model, source.adapter.folder)


def _positions(study: TrainedReference, model: Any) -> Positions:
    vocabulary = model.get_base_model().get_output_embeddings().weight.shape[0]
    rows, tokenizer = study.source.rows, study.voice.tokenizer
    if rows is not None and any(rows.data.eval.trained):
        layout = (rows.section.max_length, rows.section.packing)
        return fidelity.choose_positions(rows.data.eval, layout, rows.chat.pad_id, vocabulary)
    study.sink.emit(Notice("verify", "there are no evaluation rows: exports are measured on built-in probe texts"))
    split = fidelity.probe_split(tokenizer, PROBE_LENGTH)
    if max(max(row.input_ids) for row in split.rows) >= vocabulary:
        what = f"{study.source.adapter.folder}: its tokenizer has tokens beyond the model's {vocabulary:,} rows"
        raise ExportError(what, "save the adapter with the tokenizer that it was trained with")
    pad_id = tokenizer.pad_token_id or 0  # told by place, never by id
    return fidelity.choose_positions(split, (PROBE_LENGTH, False), pad_id, vocabulary, fidelity.PROBE_ROWS)


def _importance(source: Source, model: Any, sink: Sink) -> Imatrix:
    """From the run's training rows; from the evaluation rows where these are all there are."""
    rows = source.rows
    assert rows is not None, "study has looked before"
    split, packs = choose_packs((rows.data.train, rows.data.eval), rows.section)
    return collect(model, make_batches(split, packs, rows.chat.pad_id, rows.section), sink)


def better_base(lines: Sequence[tuple[MergeBase, Fidelity]]) -> MergeBase:
    """The merge base with the lower KL."""
    return min(lines, key=lambda pair: pair[1].kl)[0]
