"""Token-weighted accumulation, noise per document, and a loss that is the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora import numerics
from qlora.batch import Batch
from qlora.step.forward import (
    CausalParts,
    batch_logprobs,
    batch_loss,
    forward_backward,
    neftune_noise,
    seed_micro_batch,
)
from qlora.step.loss import Objective, SupervisedObjective, chunk_tokens
from tests.card import Card, rehearsal
from tests.step.adapted import adapted


@pytest.fixture(scope="module")
def model(llama: Path):  # type: ignore[no-untyped-def]
    return adapted(llama)


def batch_of(rows: list[list[int]], trained: list[int]) -> Batch:
    """Rows of one document each, padded to a common length; the last `trained[i]` tokens of row i are targets."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    positions = torch.zeros_like(ids)
    documents = torch.ones_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        positions[i] = torch.cat([torch.arange(len(row)), torch.arange(width - len(row))])
        documents[i, : len(row)] = 0
        weights[i, len(row) - 1 - trained[i] : len(row) - 1] = 1.0
    targets = torch.roll(ids, -1, 1) * (weights > 0)
    return Batch(ids, positions, documents, targets, weights, weights.flatten().nonzero().squeeze(1))


def uneven_rows() -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [64, 12, 30, 5]
    rows = [torch.randint(4, 100, (n,), generator=generator).tolist() for n in lengths]
    return rows, [60, 8, 20, 2]  # trained tokens: a mean of means would weigh the last row 30 times too much


def gradients(  # type: ignore[no-untyped-def]
    model, batches: list[Batch], objective: Objective | None = None
) -> dict[str, torch.Tensor]:
    parts = CausalParts.of(model.get_base_model())
    model.zero_grad(set_to_none=True)
    objective = objective or SupervisedObjective()
    total = sum(objective.weight(batch) for batch in batches)
    for batch in batches:
        forward_backward(parts, batch, objective, total)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([tensor.flatten() for tensor in side.values()]) for side in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_uneven_micro_batches_equal_one_batch(model) -> None:  # type: ignore[no-untyped-def]
    rows, trained = uneven_rows()
    whole = gradients(model, [batch_of(rows, trained)])
    split = gradients(model, [batch_of([row], [count]) for row, count in zip(rows, trained, strict=True)])
    assert relative(split, whole) < 1e-5


def test_the_objective_decides_what_the_gradient_is_of(model) -> None:  # type: ignore[no-untyped-def]
    """Any reduction of log-probabilities will do: here the sum of their squares."""

    class Squares:
        def weight(self, batch: Batch) -> float:
            return 1.0

        def loss(self, logprobs_T: torch.Tensor, batch: Batch) -> torch.Tensor:
            return logprobs_T.square().sum()

    rows, trained = uneven_rows()
    whole, parts = batch_of(rows, trained), CausalParts.of(model.get_base_model())
    found = gradients(model, [whole], Squares())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(batch_logprobs(parts, whole).square().sum(), list(parameters.values()))
    assert relative(found, dict(zip(parameters, wanted, strict=True))) < 1e-6


def test_the_loss_is_the_models_own(model) -> None:  # type: ignore[no-untyped-def]
    rows, trained = uneven_rows()
    causal_lm = model.get_base_model()
    expected = 0.0
    for row, count in zip(rows, trained, strict=True):
        ids = torch.tensor([row])
        labels = torch.full_like(ids, -100)
        labels[0, -count:] = ids[0, -count:]
        expected += float(causal_lm(input_ids=ids, labels=labels).loss.detach()) * count
    ours = float(batch_loss(CausalParts.of(causal_lm), batch_of(rows, trained), SupervisedObjective()).detach())
    assert ours == pytest.approx(expected, rel=1e-5)


def test_random_state_is_a_function_of_the_place() -> None:
    seed_micro_batch(1, 2, 3)
    one = torch.rand(4)
    torch.rand(100)
    seed_micro_batch(1, 2, 3)
    assert torch.equal(torch.rand(4), one)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        seed_micro_batch(*other)
        assert not torch.equal(torch.rand(4), one)


def test_noise_has_each_documents_own_magnitude() -> None:
    """alpha / sqrt(L·D): documents of 4 and 16 tokens in one pack get the noise that they would get alone."""
    documents = torch.tensor([[0] * 4 + [1] * 16])
    zeros = torch.zeros_like(documents)
    batch = Batch(zeros, zeros, documents, zeros, zeros.float(), zeros[0, :0])
    noise = neftune_noise(torch.zeros(1, 20, 64), batch, alpha=8.0)
    assert noise[0, :4].abs().max() == pytest.approx(8.0 / (4 * 64) ** 0.5, rel=0.02)
    assert noise[0, 4:].abs().max() == pytest.approx(8.0 / (16 * 64) ** 0.5, rel=0.02)


def test_a_run_goes_on_with_the_chunks_that_it_began_with(model, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    causal_lm = model.get_base_model()
    assert CausalParts.of(causal_lm).chunk_tokens == chunk_tokens(384) != chunk_tokens(384, on_card=True)
    assert CausalParts.of(causal_lm, on_card=True).chunk_tokens == chunk_tokens(384, on_card=True)
    with rehearsal(monkeypatch, Card(total=1 << 30)):
        assert CausalParts.of(causal_lm).chunk_tokens == chunk_tokens(384, on_card=True)
    with numerics.in_force(numerics.Numerics(head_chunk=77)):
        assert CausalParts.of(causal_lm).chunk_tokens == 77
