"""GRPO's loss and gradient against its formula, over the model's own logits; its advantages and figures."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.objective_keys import ObjectiveKeys
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.group_relative import GroupObjective, Seen, advantages_of, at_temperature, without_signal
from qlora.step.loss import softcap
from qlora.step.objectives import objective_of
from qlora.training.answered import Answer
from tests.step.adapted import adapted, is_the_formula
from tests.training.answer_cases import REWARDS, batches_over, drawn, train_section

KEYS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "iterated": {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3, "beta": 0.5},
    "dapo": {"loss_type": "dapo", "num_iterations": 2, "beta": 0.0, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 0.7},
    "masked": {"mask_truncated_completions": True, "scale_rewards": "batch", "num_iterations": 3},
    "masked tokens": {"mask_truncated_completions": True, "loss_type": "dapo", "temperature": 1.5},
}


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return adapted(llama)


# --- the formulas once more, of one answer after the other ------------------------------------------------------------


def plain_advantages(keys: ObjectiveKeys) -> list[float]:
    found = []
    for start in range(0, len(REWARDS), keys.num_generations):
        group = REWARDS[start : start + keys.num_generations]
        deviation = {"group": statistics.stdev(group), "batch": statistics.stdev(REWARDS), "none": 1 - 1e-4}
        found += [(one - statistics.mean(group)) / (deviation[keys.scale_rewards] + 1e-4) for one in group]
    return found


def plain_loss(model: Any, answers: list[Answer], keys: ObjectiveKeys) -> Tensor:
    """Equation 3 of 2402.03300, a token at a time, with what is another in the other ways to count."""
    low, high = keys.clip
    sums, lengths = [], []
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / keys.temperature
        terms = []
        for at, token in enumerate(answer.token_ids):
            logprob = torch.log_softmax(logits[len(answer.prompt_ids) + at - 1], dim=-1)[token]
            old = logprob.detach() if keys.num_iterations == 1 else torch.tensor(answer.old[at])
            ratio = torch.exp(logprob - old)
            cut = min(max(float(ratio.detach()), 1 - low), 1 + high) * answer.advantage
            surer = ratio * answer.advantage
            term = -surer if float(surer.detach()) <= cut else torch.tensor(-cut)
            behind = torch.exp(answer.reference[at] - logprob) - (answer.reference[at] - logprob) - 1
            terms.append(term + keys.strength * behind)
        counts = answer.ended or not keys.mask_truncated_completions
        sums.append(torch.stack(terms).sum() * counts)
        lengths.append(len(terms) * counts)
    if keys.loss_type == "dapo":
        return torch.stack(sums).sum() / sum(lengths)
    if keys.loss_type == "dr_grpo":
        return torch.stack(sums).sum() / (len(answers) * keys.max_completion_length)
    return sum((one / max(count, 1) for one, count in zip(sums, lengths, strict=True)), torch.zeros(())) / len(answers)


@pytest.mark.parametrize("micro", [6, 4, 1])
@pytest.mark.parametrize("loss_chunk", [0, 7])  # the head is asked again, or comes with its gradient
@pytest.mark.parametrize("name", list(KEYS))
def test_loss_and_gradient_are_the_papers(model: Any, name: str, loss_chunk: int, micro: int) -> None:
    """Whatever micro-batches the answers are in, longer ones and shorter ones, masked ones alone in theirs as well."""
    keys = train_section(**KEYS[name])
    answers = drawn(advantages_of(REWARDS, keys))
    parts = CausalParts.of(model.get_base_model())
    transform = at_temperature(parts.transform, keys.temperature)
    parts = replace(parts, loss_chunk=loss_chunk, chunk_tokens=8, transform=transform)
    batches = batches_over(answers, keys).batches_of(answers, micro)

    def ours() -> Tensor:
        objective = objective_of(keys)
        weight = sum(objective.weight(batch) for batch in batches)
        some = [batch for batch in batches if batch.trained_T.numel()]  # others are no work for a step
        return torch.stack([forward_backward(parts, batch, objective, weight) for batch in some]).sum() / weight

    is_the_formula(model, ours, lambda: plain_loss(model.get_base_model(), answers, keys))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_the_group(scale: str) -> None:
    keys = train_section(scale_rewards=scale)
    found = advantages_of(REWARDS, keys)
    assert found == pytest.approx(plain_advantages(keys), rel=1e-9)
    assert sum(found[:3]) == pytest.approx(0, abs=1e-9)
    assert advantages_of([0.3] * 6, keys) == pytest.approx([0.0] * 6, abs=1e-9)


def test_groups_of_equal_rewards_are_without_signal() -> None:
    assert without_signal([1, 1, 1, 0, 1, 0], 3) == 1
    assert without_signal([1, 1, 0, 0], 2) == 2


def test_figures_are_sums_over_trained_tokens(model: Any) -> None:
    keys = train_section(num_iterations=2, beta=0.5)
    answers = drawn(advantages_of(REWARDS, keys))
    objective, parts = objective_of(keys), CausalParts.of(model.get_base_model())
    assert isinstance(objective, GroupObjective)
    for batch in batches_over(answers, keys).batches_of(answers, 4):
        forward_backward(parts, batch, objective, 1.0)
    seen = Seen.of(objective.seen)
    kl = clipped = mismatch = 0.0
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        logits = model.get_base_model()(input_ids=ids).logits[0].detach()
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        for at, token in enumerate(answer.token_ids):
            one = float(logprobs[len(answer.prompt_ids) + at - 1, token])
            further, ratio = answer.reference[at] - one, torch.exp(torch.tensor(one - answer.old[at]))
            kl += float(torch.exp(torch.tensor(further))) - further - 1
            clipped += bool(ratio > 1.2 and answer.advantage > 0) or bool(ratio < 0.8 and answer.advantage < 0)
            mismatch += abs(one - answer.logprobs[at])
    assert seen.tokens == sum(len(answer.token_ids) for answer in answers)
    assert (seen.kl, seen.mismatch) == pytest.approx((kl, mismatch), rel=1e-4)
    assert seen.clipped == clipped > 0
    objective.begin()
    assert not objective.seen


def test_rows_that_show_an_answer_are_learned_as_ever(model: Any) -> None:
    """What evaluation measures, and an export compares: the loss of the rows' own answers."""
    keys = train_section()
    answers = drawn([1.0] * 6)
    batch = replace(batches_over(answers, keys).batches_of(answers, 6)[0], drawn_KT=None)
    objective, logprobs_T = GroupObjective(keys), torch.randn(batch.trained_T.numel())
    supervised = objective_of(ObjectiveKeys())
    assert objective.weight(batch) == supervised.weight(batch)
    assert float(objective.loss(logprobs_T, batch)) == float(supervised.loss(logprobs_T, batch))
    assert not objective.seen


def test_a_temperature_divides_what_the_model_does_to_its_logits() -> None:
    logits = torch.randn(3, 5)
    for transform in (None, partial(torch.mul, other=0.25), partial(softcap, cap=3.0, factor=2.0)):
        cooled = at_temperature(transform, 0.5)
        assert cooled is not None
        plain = logits if transform is None else transform(logits)
        assert torch.allclose(cooled(logits), plain / 0.5)
        assert at_temperature(transform, 1.0) is transform
