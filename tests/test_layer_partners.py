"""What everything on the device means for who runs a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from qlora.batch import Batch
from qlora.errors import ModelError
from qlora.layer_partners import RESIDENT, OnDevice, Resident, hold, is_closed, number_of, weights_of
from qlora.model.document_mask import DocumentMask


def test_an_input_on_the_device_is_itself() -> None:
    x, partner = torch.ones(2, 3), OnDevice()
    assert partner.give(partner.keep(4, x)) is x


def test_a_layer_that_nobody_knows_is_not_computed_with_anothers_weights() -> None:
    known, unknown = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    numbers = {id(known): 3}
    assert number_of(known, numbers, RESIDENT) == number_of(known, numbers, Resident()) == 3
    assert number_of(unknown, numbers, RESIDENT) == 0
    with pytest.raises(ModelError, match="a layer \\(Linear\\) is not among those whose weights are streamed"):
        number_of(unknown, numbers, Resident())


def test_an_input_that_was_changed_in_its_place_is_an_error() -> None:
    x, partner = torch.ones(2, 3), OnDevice()
    ticket = partner.keep(0, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in its place"):
        partner.give(ticket)


def test_resident_weights_are_there_whenever_they_are_used() -> None:
    weights = Resident()
    weights.use(0, 1)
    weights.use(0, None)
    weights.release(0)


def layer(hidden: torch.Tensor, **_: Any) -> torch.Tensor:
    return hidden


def test_a_mask_by_documents_is_nothing_that_layers_share() -> None:
    """On a GPU every layer is handed one: taken for more than that, none would be run by us."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(ids, ids, ids, ids, ids.float(), ids[0], torch.tensor([0, 4], dtype=torch.int32), (4,))
    hidden = torch.ones(1, 4, 2, requires_grad=True)
    assert is_closed(partial(layer, attention_mask=DocumentMask(batch, window=3)), (hidden,))


def test_what_layers_write_to_is_shared() -> None:
    @dataclass
    class States:
        keys: torch.Tensor

    hidden = torch.ones(2)
    assert not is_closed(partial(layer, states=States(hidden)), (hidden,))
    assert not is_closed(partial(layer, states={}), (hidden,))
    assert not is_closed(layer, (hidden, torch.ones(1, requires_grad=True)))
    assert is_closed(partial(layer, scale=(1.0, None, hidden)), (hidden, "sliding"))


def test_a_model_knows_who_holds_its_layers() -> None:
    model, weights = torch.nn.Linear(1, 1), Resident()
    assert weights_of(model) is RESIDENT
    hold(model, weights)
    assert weights_of(model) is weights
