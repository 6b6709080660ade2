"""What is drawn a second time is what was drawn the first time, and nobody else notices."""

from __future__ import annotations

import pytest
import torch

from qlora.random_state import RandomState

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_same_numbers_are_drawn_again_and_the_next_ones_are_those_that_were_next() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = RandomState.of(CPU)
        drawn, following = torch.rand(4), torch.rand(4)
        torch.manual_seed(3)
        torch.rand(4)
        with state.drawing_again():
            assert torch.equal(torch.rand(4), drawn)
            torch.rand(100)
        assert torch.equal(torch.rand(4), following)


def test_a_failure_inside_puts_the_state_back() -> None:
    with torch.random.fork_rng(devices=[]):
        state, before = RandomState.of(CPU), torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), state.drawing_again():
            torch.rand(1)
            raise ZeroDivisionError
        assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_of_the_card_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"card": torch.tensor([1], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: states["card"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, place: states.update(card=state))
    state = RandomState.of(CUDA)
    states["card"] += 1
    with state.drawing_again():
        assert states["card"].tolist() == [1]
        states["card"] += 5
    assert states["card"].tolist() == [2]
