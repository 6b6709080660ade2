"""Losses and gradients of each objective against its formula, written anew from its paper over the model's logits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.data import judged_splits
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.objective_keys import ObjectiveKeys
from qlora.step.forward import CausalParts, batch_logprobs, evaluating, forward_backward
from qlora.step.head_loss import weights_of
from qlora.step.loss import SupervisedObjective
from qlora.step.objectives import Figures, PreferenceObjective, answers_of, objective_of
from tests.data.judged_cases import judged_split
from tests.step.adapted import adapted, is_the_formula

PAIRS = [(5, 9, 6), (3, 4, 12), (7, 2, 2), (4, 20, 1), (6, 5, 8)]
KEYS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "cdpo": {"objective": "dpo", "label_smoothing": 0.2},
    "rpo": {"objective": "dpo", "sft_weight": 0.7},
    "ipo": {"beta": 0.2},
    "orpo": {"beta": 0.25},
    "simpo": {"simpo_gamma": 0.4, "sft_weight": 0.1},
    "kto": {"beta": 0.4},
    "weighed kto": {"objective": "kto", "beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6},
}


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return adapted(llama)


def keys_of(name: str) -> ObjectiveKeys:
    return ObjectiveKeys(**{"objective": name, **KEYS[name]})


def with_reference(split: PreparedSplit) -> PreparedSplit:
    """What the reference says, near to what such a model says; and KTO's other answers with theirs."""
    assert split.preference is not None
    told = [-6.9 * count + 0.1 * at for at, count in enumerate(split.trained)]
    others = judged_splits.mismatched(split)
    assert others.preference is not None
    theirs = [-7.2 * count + 0.2 * at for at, count in enumerate(others.trained)]
    others = replace(others, preference=others.preference._replace(reference=theirs))
    return replace(split, preference=split.preference._replace(reference=told, others=others))


# --- the formulas once more, of one document after the other ----------------------------------------------------------


def plain_logprob(model: Any, split: PreparedSplit, row: int) -> tuple[Tensor, int]:
    """Of an answer: the sum of log-probabilities, by the model's own forward on that row alone, and its tokens."""
    tokens = split.rows[row]
    ids = torch.tensor([tokens.input_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    places = [at for at, weight in enumerate(tokens.loss_weights) if weight]
    return torch.stack([logprobs[at - 1, tokens.input_ids[at]] for at in places]).sum(), len(places)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def plain_loss(model: Any, split: PreparedSplit, keys: ObjectiveKeys) -> Tensor:
    """The mean over all pairs, or answers, of the split."""
    assert split.preference is not None and split.preference.reference is not None
    reference, beta, losses = split.preference.reference, keys.strength, []
    asked = [plain_logprob(model, split, row) for row in range(len(split.lengths))]
    if keys.objective == "kto":
        others = split.preference.others
        assert others is not None and others.preference is not None and others.preference.reference is not None
        gains = [
            plain_logprob(model, others, row)[0].detach() - others.preference.reference[row]
            for row in range(len(split.lengths))
        ]
        z = torch.stack(gains).mean().clamp(min=0)
        for row, (logprob, _) in enumerate(asked):
            above = beta * (logprob - reference[row] - z)
            good, bad = keys.desirable_weight or 1.0, keys.undesirable_weight or 1.0
            losses.append(good * (1 - sigmoid(above)) if row % 2 == 0 else bad * (1 - sigmoid(-above)))
        return torch.stack(losses).mean()
    for row in range(0, len(asked), 2):
        (w, n_w), (l, n_l) = asked[row], asked[row + 1]  # noqa: E741
        ref_w, ref_l = reference[row], reference[row + 1]
        if keys.objective == "dpo":
            h, e = beta * ((w - ref_w) - (l - ref_l)), keys.label_smoothing
            loss = -(1 - e) * torch.log(sigmoid(h)) - e * torch.log(sigmoid(-h))
        elif keys.objective == "ipo":
            loss = ((w - ref_w) / n_w - (l - ref_l) / n_l - 1 / (2 * beta)) ** 2
        elif keys.objective == "orpo":
            p_w, p_l = torch.exp(w / n_w), torch.exp(l / n_l)
            ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
            loss = -w / n_w - beta * torch.log(sigmoid(torch.log(ratio)))
        else:
            loss = -torch.log(sigmoid(beta * w / n_w - beta * l / n_l - keys.simpo_gamma))
        if keys.objective != "orpo" and keys.sft_weight:
            loss = loss + keys.sft_weight * -w / n_w
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss_chunk", [0, 7])  # the head is asked again, or comes with its gradient
@pytest.mark.parametrize("name", list(KEYS))
def test_loss_and_gradient_are_the_papers(model: Any, name: str, loss_chunk: int, packed: bool) -> None:
    """In micro-batches of unequal numbers of pairs, packed and not: the mean over all pairs, no mean of means."""
    split, keys = with_reference(judged_split(PAIRS, together=packed)), keys_of(name)
    parts = replace(CausalParts.of(model.get_base_model()), loss_chunk=loss_chunk, chunk_tokens=8)
    packs = [[(0, 1), (2, 3, 4, 5)], [(6, 7), (8, 9)]] if packed else [[(0, 1), (2, 3), (4, 5)], [(6, 7), (8, 9)]]
    batches = [collate(split, some, 0, 64) for some in packs]

    def ours() -> Tensor:
        objective = objective_of(keys)
        assert isinstance(objective, PreferenceObjective)
        weight = sum(objective.weight(batch) for batch in batches)
        assert weight == (10 if keys.objective == "kto" else 5)
        with evaluating(model):
            objective.begin(batches, lambda batch: batch_logprobs(parts, batch))
        assert 0 < float(objective.divergence) < 9 or keys.objective != "kto"
        return torch.stack([forward_backward(parts, batch, objective, weight) for batch in batches]).sum() / weight

    is_the_formula(model, ours, lambda: plain_loss(model.get_base_model(), split, keys))


def test_what_the_step_knows_of_its_answers(model: Any) -> None:
    split = with_reference(judged_split(PAIRS[:2]))
    parts = CausalParts.of(model.get_base_model())
    batch = collate(split, [(0, 1, 2, 3)], 0, 64)
    assert batch.signs_R is not None and batch.signs_R.tolist() == [1, -1, 1, -1]
    with torch.no_grad():
        answers = answers_of(batch_logprobs(parts, batch), batch)
        alone = [float(plain_logprob(model.get_base_model(), split, row)[0]) for row in range(4)]
    assert answers.tokens_R.tolist() == [9, 6, 4, 12] == split.trained
    assert answers.logprobs_R.tolist() == pytest.approx(alone, abs=1e-4)
    assert answers.reference_R.tolist() == pytest.approx(split.preference.reference)  # type: ignore[union-attr]


def test_figures_count_pairs_and_answers(model: Any) -> None:
    split = with_reference(judged_split(PAIRS))
    parts = CausalParts.of(model.get_base_model())
    pairs = [collate(split, [(0, 1, 2, 3)], 0, 64), collate(split, [(4, 5)], 0, 64)]
    for name in ("dpo", "kto", "marked"):
        objective = objective_of(keys_of("kto" if name == "marked" else name))
        batches = [replace(batch, paired=name != "marked") for batch in pairs]
        assert isinstance(objective, PreferenceObjective)
        with torch.no_grad():
            objective.begin(batches, lambda batch: batch_logprobs(parts, batch))
            for batch in batches:
                objective.loss(batch_logprobs(parts, batch), batch)
        seen = Figures.of(objective.seen)
        assert [batch.paired for batch in pairs] == [True, True]
        assert (seen.compared, seen.better, seen.worse, seen.tokens) == (6 if name == "marked" else 3, 3, 3, 35)
        with torch.no_grad():
            plain = [float(plain_logprob(model.get_base_model(), split, row)[0]) for row in range(6)]
        assert seen.loss == pytest.approx(-sum(plain), rel=1e-5)
        rewards = [objective.keys.strength * (x - r) for x, r in zip(plain, split.preference.reference, strict=False)]  # type: ignore[union-attr, arg-type]
        assert seen.better_reward == pytest.approx(sum(rewards[0::2]), rel=1e-4)
        assert seen.worse_reward == pytest.approx(sum(rewards[1::2]), rel=1e-4)
        above = [reward - objective.keys.strength * float(objective.divergence) for reward in rewards]
        if name == "marked":
            assert seen.right == sum(x > 0 for x in above[0::2]) + sum(x < 0 for x in above[1::2])
            assert seen.likelier == 0
        else:
            assert seen.right == sum(w > l for w, l in zip(rewards[0::2], rewards[1::2], strict=True))  # noqa: E741
        objective.begin([], lambda batch: torch.zeros(0))
        assert not objective.seen


def test_a_sure_model_has_finite_odds() -> None:
    """Log-probabilities of 0: the odds of ORPO would be infinite, and their gradient no number."""
    split = with_reference(judged_split([(2, 3, 3)]))
    batch = collate(split, [(0, 1)], 0, 16)
    objective = PreferenceObjective(keys_of("orpo"))
    weigh = weights_of(objective, batch)
    assert callable(weigh)
    weights, loss = weigh(torch.zeros(6))
    assert math.isfinite(float(loss)) and bool(weights.isfinite().all())


def test_supervised_runs_have_the_objective_that_they_had() -> None:
    assert objective_of(ObjectiveKeys()) == SupervisedObjective()
