"""What a model makes of rows: the loss of each, how many of its tokens it would have chosen, and its own answers.

By transformers the numbers are those of the table of fidelity (`export/verify`), and so are those of a GGUF file, which
llama.cpp computes in a child process. A row is computed by itself: what stands beside it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.chat import ChatTokenizer
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Progress, Sink
from qlora.export.gguf.probes import PROBE_TEXTS
from qlora.export.llama_cpp import runtime
from qlora.export.verify.fidelity import REFERENCE_BYTES, live_logprobs
from qlora.model import generate
from qlora.training.questions import Question

GGUF_AT_ONCE = 64  # answers of one process: each loads the file
_PROBES = 20  # texts that a file's tokens are compared on
_HINT = "name the file that was exported from that run, or the run that this file is of"
_NOT_FINITE = "one of its weights is damaged or over the format's range: train or export it again, in bf16 or f32"


@dataclass(frozen=True)
class RowScores:
    """Of each row, by what its tokens count: summed loss in nats, and tokens that the model itself would have chosen;
    `weights` is what they count."""

    nats: list[float]
    hits: list[float]
    weights: list[float]

    def add(self, name: str, chunks: Iterable[Tensor], targets_N: Tensor, weights_N: Tensor) -> None:
        """One more row, of which `chunks` are the log-probabilities (C, V), each let go before the next is computed:
        of 8,192 tokens and 152k entries all of them are 5 GB. Raises ExportError where one is no finite number."""
        found, chosen, start = [], [], 0
        for chunk_CV in chunks:
            logprobs_CV = chunk_CV.float().cpu()
            targets_C = targets_N[start : start + len(logprobs_CV)]
            found.append(logprobs_CV.gather(1, targets_C[:, None]).squeeze(1).double())
            chosen.append(logprobs_CV.argmax(dim=1))
            start += len(logprobs_CV)
            del chunk_CV, logprobs_CV
        found_N, hits_N = torch.cat(found), (torch.cat(chosen) == targets_N).double()
        if not bool(torch.isfinite(found_N).all()):
            raise ExportError(f"{name}: computes numbers that are not finite", _NOT_FINITE)
        self.nats.append(float(-(found_N * weights_N).sum()))
        self.hits.append(float((hits_N * weights_N).sum()))
        self.weights.append(float(weights_N.sum()))


@dataclass(frozen=True)
class Asked:
    """What every model is given: rows with trained tokens, questions of some of them (`answered` says which), and how
    long an answer may be."""

    split: PreparedSplit
    chat: ChatTokenizer
    max_length: int
    answered: Sequence[int]
    questions: Sequence[Question]
    max_new_tokens: int
    sink: Sink
    check: Callable[[], None]


def by_torch(model: Any, asked: Asked, device: torch.device, name: str) -> tuple[RowScores, list[str]]:
    """Scores and answers of a loaded model, in the order of rows and questions."""
    scores = RowScores([], [], [])
    for row in range(len(asked.split.lengths)):
        asked.check()
        asked.sink.emit(Progress(f"rows of {name}", row, len(asked.split.lengths)))
        batch = collate(asked.split, [(row,)], asked.chat.pad_id, asked.max_length)
        targets_N = batch.targets_BS.flatten()[batch.trained_T]
        weights_N = batch.loss_weights_BS.flatten()[batch.trained_T].double()
        scores.add(name, live_logprobs(model, [batch], device), targets_N, weights_N)
    asked.sink.emit(Progress(f"rows of {name}", len(asked.split.lengths), len(asked.split.lengths)))

    def watch(done: int, total: int) -> None:
        asked.check()
        asked.sink.emit(Progress(f"answers of {name}", done, total, "tokens"))

    if not asked.questions:
        return scores, []
    prompts = [question.prompt_ids for question in asked.questions]
    ends, pad = asked.chat.end_token_ids, asked.chat.pad_id
    written = generate.greedy(model, prompts, ends, asked.max_new_tokens, pad, watch=watch)
    return scores, _texts(asked.chat, written)


def by_llama(file: Path, asked: Asked) -> tuple[RowScores, list[str]]:
    """The same of a GGUF file. Raises ExportError where it has another tokenizer than the rows were made with."""
    found = runtime.find_runtime()
    if found is None:
        raise ExportError("llama.cpp is not installed, and a GGUF file is asked through it", "pip install xllamacpp")
    _refuse_other_tokens(found, file, asked)
    scores = RowScores([], [], [])
    for rows in _stretches(asked):
        asked.check()
        asked.sink.emit(Progress(f"rows of {file.name}", rows[0], len(asked.split.lengths)))
        places = [_positions(asked.split, row) for row in rows]
        request = runtime.Request(rows=[(ids[: at[-1] + 1], at) for ids, at, _ in places])
        with runtime.ask(found, file, request) as answer:
            start = 0
            for ids, at, weights in places:
                logprobs_NV = torch.from_numpy(np.array(answer.logprobs_NV[start : start + len(at)]))
                targets_N = torch.tensor([ids[position + 1] for position in at])
                if int(targets_N.max()) >= logprobs_NV.shape[1]:
                    raise ExportError(f"{file}: has fewer tokens than the rows were made of", _HINT)
                scores.add(file.name, [logprobs_NV], targets_N, torch.tensor(weights, dtype=torch.float64))
                start += len(at)
    answers: list[str] = []
    for start in range(0, len(asked.questions), GGUF_AT_ONCE):
        asked.check()
        asked.sink.emit(Progress(f"answers of {file.name}", start, len(asked.questions)))
        prompts = [question.prompt_ids for question in asked.questions[start : start + GGUF_AT_ONCE]]
        ends = sorted(asked.chat.end_token_ids)
        wanted = runtime.Request(prompts=prompts, max_new_tokens=asked.max_new_tokens, more_ends=ends)
        with runtime.ask(found, file, wanted) as answer:
            answers += _texts(asked.chat, answer.written)
    return scores, answers


def _texts(chat: ChatTokenizer, written: Sequence[Sequence[int]]) -> list[str]:
    return [str(chat.tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in written]


def _refuse_other_tokens(found: runtime.Runtime, file: Path, asked: Asked) -> None:
    texts = PROBE_TEXTS[:_PROBES]
    with runtime.ask(found, file, runtime.Request(texts=texts, add_special=False)) as answer:
        theirs = [list(ids) for ids in answer.tokenized]
    ours = [asked.chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    if sum(one != other for one, other in zip(theirs, ours, strict=True)) > len(texts) // 4:
        raise ExportError(f"{file}: has another tokenizer than the model that the rows were made for", _HINT)


def _positions(split: PreparedSplit, row: int) -> tuple[list[int], list[int], list[float]]:
    """A row's tokens, the positions that predict a trained one, and what each of those counts."""
    tokens = split.rows[row]
    at = [place - 1 for place in range(1, len(tokens.input_ids)) if tokens.loss_weights[place]]
    return list(tokens.input_ids), at, [float(tokens.loss_weights[place + 1]) for place in at]


def _stretches(asked: Asked) -> Iterator[list[int]]:
    """Rows whose log-probabilities fit into one file of the child."""
    most = max(1, REFERENCE_BYTES // (4 * len(asked.chat.tokenizer)))
    rows: list[int] = []
    held = 0
    for row, trained in enumerate(asked.split.trained):
        if rows and held + trained > most:
            yield rows
            rows, held = [], 0
        rows.append(row)
        held += trained
    if rows:
        yield rows
