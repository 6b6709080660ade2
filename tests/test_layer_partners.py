"""What everything on the device means for who runs a layer."""

from __future__ import annotations

import pytest
import torch

from qlora.layer_partners import OnDevice, Resident


def test_an_input_on_the_device_is_itself() -> None:
    x, partner = torch.ones(2, 3), OnDevice()
    assert partner.give(partner.keep(4, x)) is x


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
