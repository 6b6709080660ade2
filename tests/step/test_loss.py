"""Chunked cross-entropy against plain cross-entropy; logits that never all exist."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora.batch import Batch
from qlora.step.loss import SupervisedObjective, chunk_tokens, logits_transform, token_logprobs


def case(tokens: int = 23, hidden: int = 16, vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, hidden, generator=generator))
    hidden_TD = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    return hidden_TD, torch.randint(vocabulary, (tokens,), generator=generator), head


def supervised_loss(logprobs_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """The objective's loss of a row whose every position is trained."""
    none = torch.zeros(1, len(weights_T), dtype=torch.long)
    batch = Batch(none, none, none, none, weights_T.unsqueeze(0), torch.arange(len(weights_T)))
    return SupervisedObjective().loss(logprobs_T, batch)


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 24, 1000])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equals_plain_cross_entropy(chunk: int, softcap: float | None) -> None:
    hidden_TD, targets_T, head = case()
    transform = logits_transform(SimpleNamespace(final_logit_softcapping=softcap))
    weights_T = torch.linspace(0, 2, len(targets_T))
    loss = supervised_loss(token_logprobs(hidden_TD, targets_T, head, transform, chunk), weights_T)
    gradients = torch.autograd.grad(loss, [hidden_TD, head.weight])

    logits = head(hidden_TD)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    plain = (nn.functional.cross_entropy(logits, targets_T, reduction="none") * weights_T).sum()
    expected = torch.autograd.grad(plain, [hidden_TD, head.weight])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_all_logits_ever_exists() -> None:
    """The largest tensor with a vocabulary dimension, forward and backward, is one chunk."""
    hidden_TD, targets_T, head = case(tokens=64, vocabulary=97)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[-1] == 97:
                largest = max(largest, result.shape[0])
            return result

    with Watch():
        supervised_loss(token_logprobs(hidden_TD, targets_T, head, None, 8), torch.ones(64)).backward()
    assert largest == 8


def test_without_targets_the_loss_is_zero() -> None:
    _, _, head = case()
    logprobs = token_logprobs(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long), head, None, 8)
    assert float(supervised_loss(logprobs, torch.zeros(0))) == 0.0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"final_logit_softcapping": 30.0}, 30.0 * torch.tanh(torch.tensor(2.0) / 30.0)),
        ({"logits_scaling": 8.0}, torch.tensor(0.25)),
        ({"logit_scale": 0.0625}, torch.tensor(0.125)),
    ],
)
def test_transforms_of_known_families(config: dict[str, float], expected: torch.Tensor) -> None:
    transform = logits_transform(SimpleNamespace(**config))
    assert transform is not None
    torch.testing.assert_close(transform(torch.tensor(2.0)), expected)


def test_a_plain_model_has_no_transform() -> None:
    assert logits_transform(SimpleNamespace(final_logit_softcapping=None, logits_scaling=1.0)) is None


@pytest.mark.parametrize(
    ("vocabulary", "on_cpu", "on_card"),
    [(32_000, 524, 512), (128_256, 130, 128), (151_936, 110, 64), (262_144, 64, 64), (1_100_000, 16, 64)],
)
def test_chunks_on_a_gpu_are_whole_tiles(vocabulary: int, on_cpu: int, on_card: int) -> None:
    """130 tokens are two tiles of 128 rows, the second of which is wasted; a CPU's numbers depend on what it had."""
    assert (chunk_tokens(vocabulary), chunk_tokens(vocabulary, on_card=True)) == (on_cpu, on_card)
