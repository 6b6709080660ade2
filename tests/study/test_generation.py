"""Prompts that share a beginning are answered as each would be alone, and sampled rows follow their own seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora.model.generate import greedy
from qlora.study import generation
from qlora.study.generation import TOP, Manner, score, write
from tests import all_families
from tests.families import PAD_ID, make_config, make_model

PASSAGE = list(range(40, 70))
PROMPTS = [PASSAGE + rest for rest in ([5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 14])]
GREEDY = Manner(8, frozenset(), PAD_ID)
SAMPLED = Manner(8, frozenset(), PAD_ID, temperature=0.8)


def model_of(family: str) -> Any:
    return make_model(make_config(family))


def tokens(written: list[generation.Written]) -> list[list[int]]:
    return [list(row.token_ids) for row in written]


class Counted:
    """How many tokens a model has read, in all of its calls."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, _args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "qwen3"])
def test_a_shared_beginning_changes_no_answer(family: str) -> None:
    model = model_of(family)  # of windows shorter than the prompts, where the family has windows
    together = write(model, PROMPTS, GREEDY)
    assert tokens(together) == greedy(model, PROMPTS, (), 8, PAD_ID)
    for prompt, row in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([[*prompt, *row.token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for place, token in enumerate(row.token_ids):
            assert logprobs[place, token].item() == pytest.approx(row.logprobs[place], abs=2e-4)
            kept = logprobs[place, row.top_ids[place].astype(np.int64)]
            assert np.allclose(kept.numpy(), row.top_logprobs[place].astype(np.float32), atol=0.02)
            assert row.top_ids[place, 0] == token


def test_the_beginning_is_read_once() -> None:
    model = model_of("llama")
    counted = Counted(model)
    write(model, PROMPTS, Manner(1, frozenset(), PAD_ID))
    assert counted.tokens == len(PASSAGE) + 4 * 5  # the passage once, then four rests padded to the longest


def test_a_family_that_keeps_no_keys_reads_whole_prompts() -> None:
    config = make_config("llama", overrides={"use_cache": False})
    model = make_model(config)
    original = model.forward

    def without_cache(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        return original(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)

    model.forward = without_cache
    assert tokens(write(model, PROMPTS, GREEDY)) == greedy(model_of("llama"), PROMPTS, (), 8, PAD_ID)


@pytest.mark.parametrize("family", ["rwkv", "qwen3_5_text"])
def test_a_recurrent_family_reads_whole_prompts(family: str) -> None:
    model = make_model(all_families.make_config(family))
    assert tokens(write(model, PROMPTS, GREEDY)) == greedy(model, PROMPTS, (), 8, PAD_ID)


def test_sampling_follows_a_row_s_own_seed() -> None:
    model = model_of("llama")
    seeds = [11, 12, 13, 14]
    together = tokens(write(model, PROMPTS, SAMPLED, seeds))
    backwards = tokens(write(model, PROMPTS[::-1], SAMPLED, seeds[::-1]))
    assert together == backwards[::-1] == tokens(write(model, PROMPTS, SAMPLED, seeds))
    assert together == [tokens(write(model, [p], SAMPLED, [s]))[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    same_prompt = tokens(write(model, [PROMPTS[0]] * 3, SAMPLED, [1, 2, 1]))
    assert same_prompt[0] == same_prompt[2] != same_prompt[1]


def test_samples_come_as_often_as_they_are_likely() -> None:
    model = model_of("llama")
    drawn = write(model, [PROMPTS[0]] * 400, Manner(1, frozenset(), PAD_ID, temperature=0.8), range(400))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    likeliest = logits.topk(TOP)
    expected = (likeliest.values / 0.8).softmax(-1)
    counts = np.array([sum(row.token_ids == (token,) for row in drawn) for token in likeliest.indices.tolist()])
    assert counts.sum() == 400
    # 400 draws: four standard errors of a share are at most 0.1
    assert np.abs(counts / 400 - expected.numpy()).max() < 0.1


def test_an_end_is_no_part_of_the_answer_and_its_place_is_kept() -> None:
    model = model_of("llama")
    free = write(model, PROMPTS, GREEDY)
    end = free[2].token_ids[3]
    ended = write(model, PROMPTS, Manner(8, frozenset({end}), PAD_ID))
    for row, before in zip(ended, free, strict=True):
        at = before.token_ids.index(end) if end in before.token_ids else None
        assert row.token_ids == before.token_ids[:at] and row.ended == (at is not None)
        assert len(row.top_ids) == len(row.token_ids) + row.ended
        if row.ended:
            assert row.top_ids[-1, 0] == end
    assert ended[2].mean_probability == pytest.approx(float(np.exp(np.mean(ended[2].logprobs))))
    assert ended[2].min_probability == pytest.approx(float(np.exp(min(ended[2].logprobs))))


def test_scores_are_the_probabilities_of_given_words() -> None:
    model = model_of("gemma3")
    written = write(model, PROMPTS, GREEDY)
    answers = [row.token_ids[: 8 - place] for place, row in enumerate(written)]
    for given, row in zip(score(model, PROMPTS, answers, PAD_ID), written, strict=True):
        assert given == pytest.approx(row.logprobs[: len(given)], abs=2e-4)
    assert score(model, PROMPTS[:2], [[], [3]], PAD_ID)[0] == ()
    assert score(model, PROMPTS[:2], [[], []], PAD_ID) == [(), ()]


def test_bad_calls() -> None:
    model = model_of("llama")
    assert write(model, [], GREEDY) == []
    with pytest.raises(ValueError, match="without tokens"):
        write(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match="seed"):
        write(model, PROMPTS, SAMPLED, [1])
