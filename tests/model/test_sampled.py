"""Answers that are drawn: from the whole distribution, each with numbers of its own, whoever its neighbours are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model.generate import Asked, greedy
from qlora.model.sampled import DRAW_BITS, chosen_of, draw
from tests.step.adapted import adapted

PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]]


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return adapted(llama)


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    """Every 64th of the random numbers there are: counts are shares to one of them; what cannot be is never drawn."""
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, 1.0])
    numbers = torch.arange(64)[:, None] << (DRAW_BITS - 6)
    for temperature in (1.0, 0.5, 3.0):
        tokens, logprobs = chosen_of(logits.expand(64, -1), numbers, temperature)
        expected = torch.log_softmax(logits / temperature, dim=-1)
        counted = Counter(tokens.flatten().tolist())
        assert 2 not in counted
        for token in range(5):
            assert abs(counted[token] - 64 * float(expected[token].exp())) <= 1, (temperature, token)
        assert torch.allclose(logprobs.flatten(), expected[tokens.flatten()], atol=1e-6)


def test_the_first_and_the_last_number_mean_tokens_that_can_be() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    ends = [chosen_of(logits, torch.tensor([[number]]), 1.0)[0].item() for number in (0, (1 << DRAW_BITS) - 1)]
    assert ends == [1, 2]


def test_an_answer_follows_from_its_name_and_from_nothing_else(model: Any) -> None:
    """Alone and among others, in batches of any size; no random state of anybody's is read or moved."""
    asked = Asked((), 9, 0, batch_size=3)
    before = torch.get_rng_state()
    together = draw(model, PROMPTS, ["a", "b", "c"], 1.0, asked)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [draw(model, [p], [n], 1.0, asked)[0] for p, n in zip(PROMPTS, "abc", strict=True)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert draw(model, PROMPTS[:1], ["d"], 1.0, asked)[0].token_ids != together[0].token_ids
    assert len({one.token_ids for one in draw(model, [[5, 6]] * 4, list("efgh"), 1.0, asked)}) == 4
    assert not any(one.ended for one in together) and {len(one.token_ids) for one in together} == {9}


def test_the_end_token_is_a_part_of_the_answer(model: Any) -> None:
    """With its log-probability: a model learns when to stop."""
    whole = draw(model, PROMPTS, ["a", "b", "c"], 1.0, Asked((), 9, 0))
    end = whole[1].token_ids[4]
    cut = draw(model, PROMPTS, ["a", "b", "c"], 1.0, Asked((end,), 9, 0))
    for before, after in zip(whole, cut, strict=True):
        length = before.token_ids.index(end) + 1 if end in before.token_ids else 9
        assert after.token_ids == before.token_ids[:length]
        assert after.logprobs == pytest.approx(before.logprobs[:length], abs=1e-5)
        assert after.ended == (end in before.token_ids)


def test_log_probabilities_are_the_models_at_the_temperature(model: Any) -> None:
    (one,) = draw(model, PROMPTS[:1], ["a"], 0.7, Asked((), 6, 0))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPTS[0], *one.token_ids]])).logits[0] / 0.7
    expected = torch.log_softmax(logits, dim=-1)
    told = [float(expected[len(PROMPTS[0]) + at - 1, token]) for at, token in enumerate(one.token_ids)]
    assert one.logprobs == pytest.approx(told, abs=1e-4)


def test_a_low_temperature_draws_what_greedy_answers_say(model: Any) -> None:
    answers = greedy(model, PROMPTS, (), 6, 0)
    drawn = draw(model, PROMPTS, ["a", "b", "c"], 1e-4, Asked((), 6, 0))
    assert [list(one.token_ids) for one in drawn] == answers
