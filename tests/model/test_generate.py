"""Answers to several prompts at once are those to each alone, and asking leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qlora.model.adapters import attach, trainable
from qlora.model.base_folder import BaseFolder
from qlora.model.generate import greedy
from qlora.recipe.sections import LoraSection
from tests.families import FAMILIES, PAD_ID
from tests.model.conftest import load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], list(range(30, 60)), [99], list(range(30, 47))]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one_equals_no_cache(base_of: Callable[[str], BaseFolder], family: str) -> None:
    model = load(base_of(family), "none").float()
    together = greedy(model, PROMPTS, (), 16, PAD_ID)
    assert together == [greedy(model, [prompt], (), 16, PAD_ID)[0] for prompt in PROMPTS]
    assert together == greedy(model, PROMPTS, (), 16, PAD_ID, batch_size=2)
    assert together == greedy(model, PROMPTS, (), 16, pad_id=77), "the padding's token is never attended to"
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)


def test_stops_at_any_end_token(base_of: Callable[[str], BaseFolder]) -> None:
    model = load(base_of("llama"), "none").float()
    free = greedy(model, PROMPTS, (), 16, PAD_ID)
    ends = {free[0][3], free[2][5]}

    def cut(answer: list[int]) -> list[int]:
        stops = [place for place, token in enumerate(answer) if token in ends]
        return answer[: stops[0]] if stops else answer

    assert greedy(model, PROMPTS, ends, 16, PAD_ID) == [cut(answer) for answer in free]
    assert greedy(model, PROMPTS[:1], {free[0][0]}, 16, PAD_ID) == [[]]
    assert greedy(model, [], ends, 16, PAD_ID) == []
    with pytest.raises(ValueError, match="without tokens"):
        greedy(model, [[1], []], ends, 16, PAD_ID)


def test_adapters_on_and_off(base_of: Callable[[str], BaseFolder]) -> None:
    base = greedy(load(base_of("qwen3"), "none").float(), PROMPTS, (), 8, PAD_ID)
    model = attach(load(base_of("qwen3"), "none").float(), LoraSection(r=4), seed=1, dtype=torch.float32)
    assert greedy(model, PROMPTS, (), 8, PAD_ID) == base
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    tuned = greedy(model, PROMPTS, (), 8, PAD_ID)
    assert tuned != base
    assert tuned == [greedy(model, [prompt], (), 8, PAD_ID)[0] for prompt in PROMPTS]
    with model.disable_adapter():
        assert greedy(model, PROMPTS, (), 8, PAD_ID) == base


def test_asking_leaves_no_trace(base_of: Callable[[str], BaseFolder]) -> None:
    model = attach(load(base_of("llama")), LoraSection(r=4, dropout=0.1), seed=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.get_input_embeddings().eval()  # a mode that somebody set by hand
    modes = [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    greedy(model, PROMPTS, (), 6, PAD_ID)
    assert modes == [module.training for module in model.modules()]
    assert (config, generation) == (model.config.to_dict(), model.generation_config.to_dict())
    assert torch.equal(random_state, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
