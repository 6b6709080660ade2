"""How far each exported model is from the one that was trained, in figures that mean something to a person.

The trained model (the base in 4 bit, the adapter beside it, computed as in training) gives its log-probabilities over
the whole vocabulary at trained positions of the evaluation rows; they are kept in a temporary file. Every candidate
gives its own at the same positions. Compared are the mean Kullback-Leibler divergence KL(trained ‖ candidate) in nats,
the perplexity of the rows' own answers, and how often both would choose the same next token. KL sees what greedy text
does not: a 4-bit file may answer all questions right and still be 5e-3 nats away.

Candidates come as chunks of log-probabilities, whatever computes them: `candidates.vocabulary_logprobs` for weights,
`runtime.ask` for GGUF files.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.loader import collate
from qlora.data.packing import pack
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.export.verify.candidates import head_logprobs
from qlora.model.layer_walk import trained_hidden
from qlora.step.forward import CausalParts, evaluating, hidden_states

# The trained model's log-probabilities on the disk: 65,536 positions at a vocabulary of 2,048, 883 at one of 152,064.
REFERENCE_BYTES = 512 << 20
# Tokens that every candidate computes. An 8B model takes 16 GFLOP a token, a laptop's CPU some 500 GFLOP a second:
# 4 minutes a candidate.
MOST_TOKENS = 8192
# Compared at a time: some four fp64 copies of it live at once.
_VALUES_AT_ONCE = 1 << 22

EVALUATION_ROWS = "evaluation rows"
PROBE_ROWS = "built-in probe texts"
PROBES = (
    "The river rises in the mountains, crosses three countries and reaches the sea after eight hundred kilometres.",
    "Question: What is the capital of Portugal?\nAnswer: The capital of Portugal is Lisbon.",
    "To make bread you need flour, water, salt and yeast. Knead the dough for ten minutes and let it rise.",
    'def area(width, height):\n    """The area of a rectangle."""\n    return width * height\n',
    "Dear Ms. Weber,\n\nthank you for your order of 14 March. The lamp will be sent on Monday.\n\nKind regards",
    "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377",
    "In 1905 Albert Einstein published four papers; one of them explained the photoelectric effect.",
    "Der Zug nach Hamburg fährt heute von Gleis 7 ab und hat zehn Minuten Verspätung.",
    "La bibliothèque est ouverte du mardi au samedi, de neuf heures à dix-huit heures.",
    '{"name": "lamp", "price": 40, "colours": ["blue", "green"], "in_stock": true}',
    "If all squares are rectangles and no rectangle is a circle, then no square is a circle.",
    "| city | people |\n| --- | --- |\n| Porto | 231,800 |\n| Ghent | 265,086 |\n",
)


@dataclass(frozen=True)
class Fidelity:
    """One line of the table.

    name         what was measured: "trained", "merged on nf4", a file's name
    measured_by  who computed it: "transformers bf16", "xllamacpp 2026.10"
    kl           mean KL(trained ‖ this) in nats a position
    perplexity   exp of the mean loss on the positions' own targets
    top1         share of positions where both have the same most likely token
    bytes        size on the disk, None for what is not a file
    positions    positions measured, of `rows` rows
    """

    name: str
    measured_by: str
    kl: float
    perplexity: float
    top1: float
    bytes: int | None
    positions: int
    rows: int


@dataclass(frozen=True)
class Positions:
    """Micro-batches whose `trained_T` are the positions to measure at; `source`: EVALUATION_ROWS or PROBE_ROWS."""

    batches: tuple[Batch, ...]
    source: str

    @cached_property
    def rows(self) -> int:
        return len(self.documents())

    @property
    def count(self) -> int:
        return sum(len(batch.trained_T) for batch in self.batches)

    def targets_N(self) -> Tensor:
        return torch.cat([batch.targets_BS.flatten()[batch.trained_T] for batch in self.batches])

    def documents(self) -> list[tuple[list[int], list[int]]]:
        """Each row's token ids up to its last position, and its positions in them, in the order of `trained_T`."""
        found = []
        for batch in self.batches:
            chosen_BS = torch.zeros(batch.input_ids_BS.numel(), dtype=torch.bool)
            chosen_BS[batch.trained_T] = True
            chosen_BS = chosen_BS.view_as(batch.input_ids_BS)
            for ids_S, documents_S, chosen_S in zip(batch.input_ids_BS, batch.document_ids_BS, chosen_BS, strict=True):
                for document in documents_S.unique_consecutive().tolist():
                    inside_S = documents_S == document
                    positions = chosen_S[inside_S].nonzero().flatten().tolist()
                    if positions:
                        found.append((ids_S[inside_S][: positions[-1] + 1].tolist(), positions))
        return found


@dataclass(frozen=True)
class Reference:
    """The trained model's log-probabilities (N, V), fp32, mapped from a temporary file."""

    logprobs_NV: np.ndarray
    targets_N: Tensor
    positions: Positions


def choose_positions(
    split: PreparedSplit, layout: tuple[int, bool], pad_id: int, vocabulary: int, source: str = EVALUATION_ROWS
) -> Positions:
    """Trained positions of `split`, spread evenly over all its rows; `layout` is (data.max_length, data.packing).

    At most MOST_TOKENS tokens of rows and REFERENCE_BYTES of log-probabilities; the same choice every time.
    """
    max_length, packing = layout
    trained, step = [row for row, count in enumerate(split.trained) if count > 0], 1
    while step < len(trained) and sum(split.lengths[row] for row in trained[::step]) > MOST_TOKENS:
        step += 1
    rows = trained[::step]
    packs = pack([split.lengths[row] for row in rows], max_length) if packing else [(at,) for at in range(len(rows))]
    batches = [collate(split, [tuple(rows[at] for at in members)], pad_id, max_length) for members in packs]
    counts = [len(batch.trained_T) for batch in batches]
    available = sum(counts)
    most = min(available, max(1, REFERENCE_BYTES // (4 * vocabulary)))
    kept = torch.zeros(available, dtype=torch.bool)
    kept[torch.arange(most) * available // max(1, most)] = True
    here = zip(batches, kept.split_with_sizes(counts), strict=True)
    thinned = [replace(batch, trained_T=batch.trained_T[inside]) for batch, inside in here if inside.any()]
    if not thinned:
        raise ExportError("there is no trained position to measure on", "export with verify=False")
    return Positions(tuple(thinned), source)


def probe_split(tokenizer: Any, max_length: int) -> PreparedSplit:
    """The built-in texts as rows, every token trained: for adapters that bring no evaluation rows."""
    rows = [tokenizer(text)["input_ids"][:max_length] for text in PROBES]
    rows = [ids for ids in rows if len(ids) > 1]
    return PreparedSplit(
        rows=[TokenRow(list(ids), [1.0] * len(ids)) for ids in rows],
        lengths=[len(ids) for ids in rows],
        trained=[len(ids) - 1 for ids in rows],
        wheres=[PROBE_ROWS] * len(rows),
        sources=[0] * len(rows),
    )


def live_logprobs(model: Any, batches: Sequence[Batch], device: torch.device) -> Iterator[Tensor]:
    """The loaded model's log-probabilities at the trained positions, in fp32 chunks (C, V), as training computes them.

    `model` is the PeftModel, or a plain transformers model.
    """
    parts = CausalParts.of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    for batch in batches:
        with evaluating(model):
            on_device = batch.to(device)
            hidden_TD = trained_hidden(hidden_states(parts, on_device), on_device)
            yield from head_logprobs(hidden_TD, parts.head, parts.transform, parts.chunk_tokens)


@contextmanager
def reference(chunks: Iterable[Tensor], positions: Positions, folder: Path) -> Iterator[Reference]:
    """The trained model's log-probabilities, kept in a temporary file in `folder` for as long as the block runs."""
    with tempfile.TemporaryFile(dir=folder) as file:
        width = 0
        for chunk_CV in chunks:
            width = chunk_CV.shape[1]
            _refuse_nonfinite("the trained model", chunk_CV)
            file.write(chunk_CV.float().cpu().contiguous().numpy().data)
        file.flush()
        logprobs_NV: np.ndarray = np.memmap(file, dtype=np.float32, mode="r", shape=(positions.count, width))
        yield Reference(logprobs_NV, positions.targets_N(), positions)


def measure(
    reference: Reference,
    name: str,
    measured_by: str,
    chunks: Iterable[Tensor | np.ndarray],
    size: int | None,
    losses: list[Tensor] | None = None,
) -> Fidelity:
    """One line of the table, from the candidate's log-probabilities (C, V) at the reference's positions, in order.

    `losses` gets the loss at each position, fp64, in nats. Raises ExportError when the candidate computes numbers that
    are not finite, or for another vocabulary.
    """
    kl, loss, equal, done = 0.0, 0.0, 0, 0
    width = reference.logprobs_NV.shape[1]
    for chunk_CV in _small(chunks, width):
        if chunk_CV.shape[1] != width:
            what = f"{name}: has a vocabulary of {chunk_CV.shape[1]}, the trained model one of {width}"
            raise ExportError(what, "export again; a base with another vocabulary cannot be compared")
        _refuse_nonfinite(name, chunk_CV)
        end = done + chunk_CV.shape[0]
        trained_CV = torch.from_numpy(np.array(reference.logprobs_NV[done:end]))
        kl += float(divergence(trained_CV, chunk_CV).sum())
        losses_C = -chunk_CV.gather(1, reference.targets_N[done:end, None])[:, 0].double()
        loss += float(losses_C.sum())
        if losses is not None:
            losses.append(losses_C)
        equal += int((trained_CV.argmax(dim=1) == chunk_CV.argmax(dim=1)).sum())
        done = end
    total = len(reference.targets_N)
    if done != total:
        raise ExportError(f"{name}: was computed at {done} of {total} positions", "export again")
    kl, perplexity = kl / total, math.exp(loss / total)
    return Fidelity(name, measured_by, kl, perplexity, equal / total, size, total, reference.positions.rows)


def divergence(trained_CV: Tensor, candidate_CV: Tensor) -> Tensor:
    """KL(trained ‖ candidate) of each position (C,), fp64, from log-probabilities.

    Computed as Σ p·(eᵈ - 1 - d) with d the difference of the logarithms: the same sum, as both distributions have the
    mass 1, but no term is negative, so that fp32's rounding of d does not stand in the result (its square does).
    """
    difference_CV = candidate_CV.double() - trained_CV.double()
    terms_CV = trained_CV.double().exp_() * (torch.expm1(difference_CV) - difference_CV)
    return terms_CV.sum(dim=1)


def _small(chunks: Iterable[Tensor | np.ndarray], width: int) -> Iterator[Tensor]:
    """The same rows as fp32 tensors of the CPU, few enough at a time to be compared in fp64."""
    step = max(1, _VALUES_AT_ONCE // width)
    for chunk in chunks:
        for start in range(0, chunk.shape[0], step):
            part = chunk[start : start + step]
            # A copy: what the array is mapped from may go away, and torch warns of read-only memory.
            yield (torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part.cpu()).float()


def _refuse_nonfinite(name: str, logprobs_CV: Tensor) -> None:
    if not bool(torch.isfinite(logprobs_CV).all()):
        hint = "one of its weights is damaged or over the format's range: export again, in bf16 or f32"
        raise ExportError(f"{name}: computes numbers that are not finite", hint)
