"""Labels that are probabilities: the full KL at K = V, the targets' own loss where they are sure, no full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora.batch import Batch
from qlora.step.loss import SupervisedObjective, token_logprobs
from qlora.step.soft_labels import divergence

TOKENS, HIDDEN, VOCABULARY = 23, 16, 50


def case() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    """Hidden states, a teacher's log-probabilities over the whole vocabulary, and the student's head."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    teacher_TV = (2 * torch.randn(TOKENS, VOCABULARY, generator=generator)).log_softmax(-1)
    return hidden_TD, teacher_TV, head


def loss_of(hidden_TD: torch.Tensor, head: nn.Linear, ids: torch.Tensor, labels: torch.Tensor | None) -> Any:
    """The objective's loss of a row whose every position is trained, with its gradients."""
    none = torch.zeros(1, len(ids), dtype=torch.long)
    weights_BS = torch.linspace(0.5, 2, len(ids)).unsqueeze(0)
    batch = Batch(none, none, none, none, weights_BS, torch.arange(len(ids)), label_logprobs_TK=labels)
    loss = SupervisedObjective().loss(token_logprobs(hidden_TD, ids, head, None, chunk=7), batch)
    return loss, torch.autograd.grad(loss, [hidden_TD, head.weight])


def test_all_columns_are_the_full_kl_with_its_gradient() -> None:
    hidden_TD, teacher_TV, head = case()
    order_TV = torch.stack([torch.randperm(VOCABULARY) for _ in range(TOKENS)])
    loss, gradients = loss_of(hidden_TD, head, order_TV, teacher_TV.gather(-1, order_TV))
    student_TV = head(hidden_TD).log_softmax(-1)
    each_T = nn.functional.kl_div(student_TV, teacher_TV, reduction="none", log_target=True).sum(-1)
    full = (each_T * torch.linspace(0.5, 2, TOKENS)).sum()
    assert loss.item() == pytest.approx(full.item(), rel=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(full, [hidden_TD, head.weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("places", [1, 64])
def test_a_sure_label_is_the_targets_own_loss_to_the_last_bit(places: int) -> None:
    hidden_TD, _, head = case()
    targets_T = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    labels_TK = torch.full((TOKENS, places), -torch.inf)
    labels_TK[:, 0] = 0.0
    soft, of_soft = loss_of(hidden_TD, head, targets_T.unsqueeze(1).repeat(1, places), labels_TK)
    hard, of_hard = loss_of(hidden_TD, head, targets_T, None)
    assert soft.item() == hard.item()
    for ours, theirs in zip(of_soft, of_hard, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_what_the_columns_do_not_hold_stays_where_the_teacher_has_it() -> None:
    """Descending to the least loss, the student gives the rest what the teacher gave it, and not nothing."""
    labels_TK = torch.tensor([[0.6, 0.2]]).log()
    logits_TV = torch.zeros(1, 10, requires_grad=True)
    step = torch.optim.Adam([logits_TV], lr=0.05)
    for _ in range(400):
        step.zero_grad()
        loss = divergence(logits_TV.log_softmax(-1)[:, :2], labels_TK).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        step.step()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    rest = logits_TV.softmax(-1)[0, 2:].sum().item()
    assert rest == pytest.approx(0.2, abs=0.01)


def test_no_number_is_lost_where_student_or_teacher_is_certain() -> None:
    """A student that is sure, a teacher whose rounded probabilities are above 1, places with nothing in them."""
    logits_TV = torch.tensor([[80.0, 0.0, -80.0], [0.0, 80.0, 0.0]], requires_grad=True)
    labels_TK = torch.tensor([[0.0, -torch.inf], [-0.1, -2.0]])
    loss_T = divergence(logits_TV.log_softmax(-1)[:, :2], labels_TK)
    loss_T.sum().backward()  # type: ignore[no-untyped-call]
    assert loss_T[0].item() == pytest.approx(0, abs=1e-6) and loss_T[1].item() > 10
    assert logits_TV.grad is not None and bool(logits_TV.grad.isfinite().all())


def test_columns_take_no_more_logits_than_one() -> None:
    hidden_TD, teacher_TV, head = case()
    top = teacher_TV.topk(8)
    widest: dict[int, int] = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2:
                widest[result.shape[1]] = max(widest.get(result.shape[1], 0), result.shape[0])
            return result

    with Watch():
        loss_of(hidden_TD, head, top.indices, top.values)
    assert widest[VOCABULARY] <= 7 and widest[8] == TOKENS
