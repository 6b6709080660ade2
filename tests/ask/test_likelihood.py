"""Rows scored by a model: what plain transformers computes of each row alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.ask import likelihood
from qlora.ask.likelihood import Asked, RowScores, by_torch
from qlora.data.chat import TokenRow
from qlora.data.token_cache import PreparedSplit
from qlora.errors import ExportError
from qlora.events import Recorder


class Chat:
    """As much of a tokenizer as scoring asks for."""

    pad_id = 0
    end_token_ids = (1,)
    tokenizer = range(384)


def asked(rows: list[TokenRow]) -> Asked:
    lengths = [len(row.input_ids) for row in rows]
    trained = [sum(map(bool, row.loss_weights[1:])) for row in rows]
    split = PreparedSplit(rows, lengths, trained, [f"a:{n}" for n in range(len(rows))], [0] * len(rows))
    chat: Any = Chat()
    return Asked(split, chat, 64, [], [], 0, Recorder(), lambda: None)


def test_a_token_counts_by_its_weight() -> None:
    scores = RowScores([], [], [])
    logprobs = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    scores.add("m", [logprobs[:1], logprobs[1:]], torch.tensor([0, 1]), torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert scores.nats == [pytest.approx(0.6931472 + 0.5 * 2.3025851)]
    assert (scores.hits, scores.weights) == ([1.0], [1.5])


def test_one_chunk_is_held_at_a_time() -> None:
    """All log-probabilities of a long row are gigabytes."""
    made: list[weakref.ref[torch.Tensor]] = []

    def chunks() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert not any(one() is not None for one in made)
            chunk = torch.full((2, 3), 1 / 3).log()
            made.append(weakref.ref(chunk))
            yield chunk
            del chunk

    scores = RowScores([], [], [])
    scores.add("m", chunks(), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.float64))
    assert scores.nats == [pytest.approx(8 * 1.0986123)] and scores.hits == [8.0] and len(made) == 4


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_finite_number_is_refused(value: float) -> None:
    logprobs, scores = torch.tensor([[-0.5, -0.5], [-0.5, value]]), RowScores([], [], [])
    with pytest.raises(ExportError, match="m: computes numbers that are not finite"):
        scores.add("m", [logprobs], torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    assert not scores.nats


def test_each_row_has_the_loss_that_transformers_gives_it_alone(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (5, 40, 17):
        ids = torch.randint(2, 380, (length,), generator=generator).tolist()
        rows.append(TokenRow(ids, [0.0] * (length // 2) + [1.0] * (length - length // 2)))
    found, answers = by_torch(model, asked(rows), torch.device("cpu"), "model")
    assert answers == []
    for row, nats, weight, hits in zip(rows, found.nats, found.weights, found.hits, strict=True):
        labels = [token if weight else -100 for token, weight in zip(row.input_ids, row.loss_weights, strict=True)]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels]), use_cache=False)
        assert nats / weight == pytest.approx(float(output.loss), rel=1e-5)
        chosen = output.logits[0, :-1].argmax(-1)
        right = [int(a == b) for a, b in zip(chosen.tolist(), labels[1:], strict=True)]
        assert hits == sum(right)


def test_what_a_file_is_asked_fits_into_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "REFERENCE_BYTES", 4 * 384 * 10)
    rows = [TokenRow(list(range(2, 2 + length)), [1.0] * length) for length in (5, 5, 4, 30, 3)]
    stretches = list(likelihood._stretches(asked(rows)))
    assert stretches == [[0, 1], [2], [3], [4]]
    ids, at, weights = likelihood._positions(asked(rows).split, 2)
    assert (ids, at, weights) == ([2, 3, 4, 5], [0, 1, 2], [1.0, 1.0, 1.0])
