"""Head and loss in one pass against the loss that asks the head again, and against autograd of all logits."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import numerics
from qlora.batch import Batch
from qlora.memory.simulation import Workload
from qlora.step import head_loss, loss
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.head_loss import chunk_tokens, head_of, share_and_loss
from qlora.step.kernels import trial
from qlora.step.loss import SupervisedObjective, logits_transform, token_logprobs
from tests.card import Card, rehearsal
from tests.families import make_config, make_model
from tests.memory.counted import real_batch

STEP_WEIGHT = 7.0


def case(kind: torch.dtype = torch.float32, bias: bool = False) -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(32, 300, bias=bias).requires_grad_(False)
    head.weight.copy_(torch.randn(300, 32, generator=generator) / 2)
    hidden_TD = torch.randn(70, 32, generator=generator).to(kind).requires_grad_()
    targets_T = torch.randint(300, (70,), generator=generator)
    return hidden_TD, targets_T, torch.linspace(0, 2, 70), head.to(kind)


def twice(hidden_TD: Tensor, targets_T: Tensor, weights_T: Tensor, head: nn.Module, transform: Any) -> Tensor:
    """The loss that asks the head once more, over the step's weight."""
    logprobs_T = token_logprobs(hidden_TD, targets_T, head, transform, 16)
    return -(logprobs_T * weights_T).sum() / STEP_WEIGHT


TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"final_logit_softcapping": 5.0},
    "scaled": {"logits_scaling": 4.0},
    "both": {"final_logit_softcapping": 3.0, "logit_scale": 0.25},
}


@pytest.mark.parametrize("chunk", [1, 64, 69, 70, 1000])
@pytest.mark.parametrize("name", list(TRANSFORMS))
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_autograds(chunk: int, name: str, bias: bool) -> None:
    hidden_TD, targets_T, weights_T, head = case(bias=bias)
    transform = logits_transform(SimpleNamespace(**TRANSFORMS[name]))
    logits = head(hidden_TD) if transform is None else transform(head(hidden_TD))
    right = (nn.functional.cross_entropy(logits, targets_T, reduction="none") * weights_T).sum()
    (expected,) = torch.autograd.grad(right / STEP_WEIGHT, hidden_TD)
    made_of = head_of(head, transform)
    assert made_of is not None
    share, summed = share_and_loss(hidden_TD, targets_T, weights_T, STEP_WEIGHT, made_of, chunk)
    (found,) = torch.autograd.grad(share, hidden_TD)
    assert summed.item() == pytest.approx(right.item(), rel=1e-6) and not summed.requires_grad
    assert share.item() == pytest.approx(summed.item() / STEP_WEIGHT, rel=1e-6)
    assert (found - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_in_bf16_it_is_as_near_to_the_truth(name: str) -> None:
    """The truth: the same numbers, computed in float32."""
    hidden_TD, targets_T, weights_T, head = case(torch.bfloat16)
    transform = logits_transform(SimpleNamespace(**TRANSFORMS[name]))
    exact_TD, exact = hidden_TD.detach().float().requires_grad_(), nn.Linear(32, 300, bias=False)
    exact.weight = nn.Parameter(head.weight.float(), requires_grad=False)
    (truth,) = torch.autograd.grad(twice(exact_TD, targets_T, weights_T, exact, transform), exact_TD)
    (before,) = torch.autograd.grad(twice(hidden_TD, targets_T, weights_T, head, transform), hidden_TD)
    made_of = head_of(head, transform)
    assert made_of is not None
    (found,) = torch.autograd.grad(
        share_and_loss(hidden_TD, targets_T, weights_T, STEP_WEIGHT, made_of, 32)[0], hidden_TD
    )
    assert found.dtype == torch.bfloat16
    assert (found.float() - truth).norm() <= 1.05 * (before.float() - truth).norm()


class Products(TorchDispatchMode):
    """Counts products with something as long as the vocabulary, and the most of its rows that a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in (*args, result) if isinstance(one, Tensor)]
        if func.overloadpacket is torch.ops.aten.mm and any(300 in one.shape for one in tensors):
            self.count["mm"] += 1
        if isinstance(result, Tensor) and not func.is_view and result.ndim == 2 and result.shape[-1] == 300:
            self.most = max(self.most, result.shape[0])
        return result


def test_the_head_is_asked_twice_a_chunk_and_not_three_times() -> None:
    hidden_TD, targets_T, weights_T, head = case()
    made_of = head_of(head, None)
    assert made_of is not None
    with Products() as ours:
        share_and_loss(hidden_TD, targets_T, weights_T, STEP_WEIGHT, made_of, 16)[0].backward()  # type: ignore[no-untyped-call]
    with Products() as before:
        twice(hidden_TD, targets_T, weights_T, head, None).backward()  # type: ignore[no-untyped-call]
    assert (ours.count["mm"], before.count["mm"]) == (2 * 5, 3 * 5)
    assert ours.most == 16


def test_other_heads_are_asked_as_before() -> None:
    class Other(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * 2

    *_, head = case()
    assert head_of(head, None) is not None
    assert head_of(head, torch.sigmoid) is None  # what it does to logits is not known here
    assert head_of(head, partial(torch.add, other=1.0)) is None
    assert head_of(Other(4, 4).requires_grad_(False), None) is None
    assert head_of(nn.Linear(4, 4), None) is None  # which is trained
    head.register_forward_hook(lambda *_: None)
    assert head_of(head, None) is None


def parts_of(family: str) -> tuple[Any, CausalParts]:
    model: Any = make_model(make_config(family)).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    return model, CausalParts.of(model)


def gradient(family: str, loss_chunk: int, change: Any = None) -> tuple[Tensor, float, int]:
    """Of a weight, the loss, and how often head and loss went in one pass."""
    model, parts = parts_of(family)
    batch = real_batch(Workload(2, 24), model.config.vocab_size)
    batch = batch if change is None else change(batch)
    calls: list[int] = []
    real = head_loss.share_and_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "share_and_loss", lambda *given: calls.append(1) or real(*given))  # type: ignore[func-returns-value]
        of_batch = forward_backward(replace(parts, loss_chunk=loss_chunk), batch, SupervisedObjective(), STEP_WEIGHT)
    return model.model.layers[0].mlp.up_proj.weight.grad, float(of_batch), len(calls)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_step_is_the_same(family: str) -> None:
    """Gemma 2 caps its logits; its head and Qwen2's are their embeddings."""
    (found, now, calls), (right, before, none) = gradient(family, 32), gradient(family, 0)
    assert (calls, none) == (1, 0) and now == pytest.approx(before, rel=1e-6)
    assert (found - right).norm() <= 2e-6 * right.norm()


def test_going_back_through_the_layers_hidden_states_are_gone() -> None:
    """Of 32,768 tokens of 8B a quarter of a GiB, at the highest place of a step."""
    model, parts = parts_of("llama")
    batch, kept, alive = real_batch(Workload(2, 24), model.config.vocab_size), [], []
    real = head_loss.share_and_loss
    model.model.layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda _: alive.append(kept[0]()))

    def watched(hidden_TD: Tensor, *given: Any) -> Any:
        kept.append(weakref.ref(hidden_TD))
        return real(hidden_TD, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "share_and_loss", watched)
        forward_backward(replace(parts, loss_chunk=32), batch, SupervisedObjective(), STEP_WEIGHT)
    assert alive == [None]


def with_labels(batch: Batch) -> Batch:
    places = len(batch.trained_T)
    labels = torch.arange(3).expand(places, 3), torch.full((places, 3), 0.3).log()
    return replace(batch, label_ids_TK=labels[0], label_logprobs_TK=labels[1])


def test_soft_labels_are_asked_as_before() -> None:
    found, right = gradient("llama", 32, with_labels), gradient("llama", 0, with_labels)
    assert found[2] == 0 and torch.equal(found[0], right[0]) and found[1] == right[1]


def test_a_chunk_is_whole_tiles() -> None:
    """Of Llama 2, Llama 3, Qwen and Gemma; a vocabulary beyond all of them still has a tile."""
    sizes = {32_000: 1024, 128_256: 512, 151_936: 384, 262_144: 256, 2_000_000: 128}
    assert {size: chunk_tokens(size) for size in sizes} == sizes


def test_a_run_keeps_its_own(llama: Path) -> None:
    with numerics.in_force(numerics.Numerics(loss_chunk=96)):
        assert parts_of("llama")[1].loss_chunk == 96
    assert parts_of("llama")[1].loss_chunk == 0  # outside of runs


def test_a_new_run_has_it_where_there_is_the_kernel_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert head_loss.chunk_of_run(151_936, torch.device("cpu")) == loss.chunk_tokens(151_936) == 110
    with rehearsal(monkeypatch, Card()):
        assert head_loss.chunk_of_run(151_936, torch.device("cpu")) == 0
        monkeypatch.setattr(trial, "work", lambda device: True)
        assert head_loss.chunk_of_run(151_936, torch.device("cpu")) == 384


def test_a_micro_batch_without_a_trained_token_has_no_loss() -> None:
    hidden_TD, targets_T, weights_T, head = case()
    known = head_of(head, None)
    assert known is not None
    share, loss_ = share_and_loss(hidden_TD[:0], targets_T[:0], weights_T[:0], STEP_WEIGHT, known, 16)
    share.backward()  # type: ignore[no-untyped-call]
    assert loss_ == 0 and hidden_TD.grad is not None and not hidden_TD.grad.any()
