"""Modules change their class for a time, also where that ends by an error, and keep their name."""

from __future__ import annotations

import pytest
from torch import nn

from qlora.model.reclassed import called_as, reclassed


def test_a_class_comes_back_whatever_happens() -> None:
    class Other(nn.Linear):
        pass

    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ZeroDivisionError), reclassed(layers, lambda kind: Other):
        assert {type(layer) for layer in layers} == {Other}
        raise ZeroDivisionError
    assert {type(layer) for layer in layers} == {nn.Linear}


def test_a_class_is_called_as_its_base() -> None:
    class Own(nn.Linear):
        pass

    assert called_as(nn.Linear, Own) is Own and repr(Own) == repr(nn.Linear)
