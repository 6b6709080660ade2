"""Norms are known by what they compute; with the kernel's function they give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.model.rms_norms import form_of, put_in
from qlora.step.kernels import operators
from tests.families import FAMILIES, make_config, make_model


class Odd(nn.Module):
    """An RMSNorm, but for `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.eps = how, 1e-5
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        if how == "bias":
            self.bias = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True) if self.how == "mean" else wide
        eps = 2 * self.eps if self.how == "epsilon" else self.eps
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return (normed * self.weight) * (2 if self.how == "factor" else 1)


@pytest.mark.parametrize("family", [*FAMILIES, "stablelm"])
def test_a_familys_norms_are_known(family: str) -> None:
    """StableLM's is LayerNorm."""
    model: Any = make_model(make_config(family))
    norms = [one for name, one in model.named_modules() if name.endswith("norm")]
    eps = getattr(norms[0], "variance_epsilon", None) or norms[0].eps
    expected = None if family == "stablelm" else (eps, "gemma" in family)
    assert {form_of(one) for one in norms} == {expected}


@pytest.mark.parametrize("how", ["", "bias", "mean", "epsilon", "factor"])
def test_any_other_norm_is_left_alone(how: str) -> None:
    assert form_of(Odd(how)) == ((1e-5, False) if not how else None)
    assert form_of(nn.Linear(4, 4)) is None and form_of(nn.LayerNorm(8, bias=False)) is None


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_states_and_gradients_are_the_models_own(family: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "PART_VALUES", 400)  # a few rows at a time
    own, ours = (make_model(make_config(family)).requires_grad_(False) for _ in range(2))
    for model in (own, ours):
        model.get_input_embeddings().weight.requires_grad_()
    ours.model.norm.weight.requires_grad_()
    count = put_in(ours, by_kernel)
    assert count == len([name for name, _ in own.named_parameters() if "norm" in name]) - 1  # the last one is trained
    ids = torch.arange(4, 34).view(2, 15)
    results = []
    for model in (own, ours):
        output = model(input_ids=ids, use_cache=False).logits
        output.square().mean().backward()
        results.append((output.detach(), model.get_input_embeddings().weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-7)
    assert list(own.state_dict()) == list(ours.state_dict())


class Gated(Odd):
    """As Mamba's: a gate may come beside x."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


def row_behind_row(x: Tensor) -> Tensor:
    """What a kernel reads of (N, D): it knows D, and no strides."""
    return x.as_strided(x.shape, (x.shape[1], 1))


def test_rows_that_lie_apart_are_laid_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention's norm is given a slice of a wider product; what comes back may be a slice too."""
    forth, back = operators.rms_norm, operators.rms_norm_backward
    monkeypatch.setattr(operators, "rms_norm", lambda x, *rest: forth(row_behind_row(x), *rest))
    monkeypatch.setattr(
        operators, "rms_norm_backward", lambda y, x, *rest: back(row_behind_row(y), row_behind_row(x), *rest)
    )
    wide = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    own, ours = Odd(""), Odd("")
    assert put_in(ours, True) == 1
    for norm in (own, ours):
        output = torch.cat((norm(wide[..., :8]), wide[..., 8:]), dim=-1)
        results.append((output.detach(), *torch.autograd.grad(output.sigmoid().sum(), wide)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_norm_that_is_given_more_than_x_computes_it_itself(by_kernel: bool) -> None:
    norm, x = Gated(""), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    right = norm(x, x), norm(x, gate=x)
    assert put_in(norm, by_kernel) == 1
    assert torch.equal(norm(x, x), right[0]) and torch.equal(norm(x, gate=x), right[1])
    assert not torch.equal(norm(x), right[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_a_kernel_x_is_kept_once_and_a_cpu_takes_few_rows_at_a_time(device: str) -> None:
    """transformers' own keeps x in float32, twice as much."""
    rows = operators.PART_VALUES // 8 + 1
    norm, x = Odd("").bfloat16(), torch.zeros(rows, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    assert put_in(norm.to(device), False) == 1
    kept: list[Tensor] = []
    with Rows() as seen, torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        norm(x).sum().backward()
    assert sorted(one.nbytes for one in kept) == [8 * 2, rows * 4, rows * 8 * 2]  # weight, 1/root, x
    assert seen.most == (rows - 1 if device == "cpu" else rows)


class Rows(TorchDispatchMode):  # type: ignore[misc]
    """The most rows of which a mean was asked."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mean.dim:
            self.most = max(self.most, len(args[0]))
        return func(*args, **(kwargs or {}))
