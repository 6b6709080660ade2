"""What an update computes is held against bitsandbytes and torch in tests/step/test_optimizer.py; here how it calls."""

from __future__ import annotations

from typing import get_args

import torch

from qlora.flat.layout import BLOCK
from qlora.flat.methods import METHODS
from qlora.recipe.sections import TrainSection


def test_there_is_a_method_for_each_optimizer_of_a_recipe() -> None:
    assert METHODS.keys() == {*get_args(TrainSection.model_fields["optimizer"].annotation)}


def test_a_call_ends_where_a_block_ends_and_its_values_can_be_counted() -> None:
    assert all(method.most_values % BLOCK == 0 and method.most_values < 2**31 for method in METHODS.values())


def test_torchs_adamw_takes_numbers_as_torch_takes_them() -> None:
    """A step of another size than one of the test that compares all: its corrections are powers of the betas."""
    from qlora.flat.methods import BETAS, EPSILON, Values, update

    generator = torch.Generator().manual_seed(0)
    weights, gradients = (torch.randn(512, generator=generator) for _ in range(2))
    moments = {"exp_avg": torch.randn(512, generator=generator), "exp_avg_sq": torch.rand(512, generator=generator)}
    theirs = torch.nn.Parameter(weights.clone())
    theirs.grad = gradients.clone()
    optimizer = torch.optim.AdamW([theirs], lr=3e-4, betas=BETAS, eps=EPSILON, weight_decay=0.1)
    state = optimizer.state[theirs]
    state |= {"step": torch.tensor(12344.0), **{name: moment.clone() for name, moment in moments.items()}}
    optimizer.step()
    update(METHODS["adamw"], Values(weights, gradients, moments, {}, None), 12345, 3e-4, 0.1)
    assert torch.equal(weights, theirs) and all(torch.equal(moments[name], state[name]) for name in moments)
