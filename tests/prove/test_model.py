"""Random models and packs for proofs: the same each time, trained in every token, and with a gradient in A."""

from __future__ import annotations

import torch

from qlora.prove.model import make, packed
from qlora.prove.proof import all_equal
from tests.prove.cases import TINY

CPU = torch.device("cpu")


def test_the_same_arguments_give_the_same_model_and_rows() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batch = packed(2, 48, TINY.vocabulary)
    one, other = (make(TINY, CPU).gradient(packed(2, 48, TINY.vocabulary)) for _ in range(2))
    assert all_equal(one, other) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(batch.input_ids_BS, packed(2, 48, TINY.vocabulary, seed=1).input_ids_BS)


def test_packs_hold_three_documents_and_padding() -> None:
    batch = packed(2, 48, TINY.vocabulary)
    assert batch.input_ids_BS.shape == (2, 48) and batch.rows == 2
    assert [int(row.unique().numel()) for row in batch.document_ids_BS] == [4, 4]
    assert int(batch.trained_T.numel()) == 2 * (48 - 5 - 3)


def test_every_adapter_has_a_gradient_and_an_update_moves_it() -> None:
    made = make(TINY, CPU)
    batch = packed(1, 48, TINY.vocabulary)
    assert all(float(gradient.abs().max()) > 0 for gradient in made.gradient(batch))
    assert all(master.grad is None for master in made.optimizer.masters.values())
    before = [master.detach().clone() for master in made.optimizer.masters.values()]
    made.step(batch, batch)
    assert not all_equal(before, [master.detach() for master in made.optimizer.masters.values()])
