"""Prompts on other things: enough of them in each language, drawn by the seed, none that the exam measures on."""

from __future__ import annotations

import pytest

from qlora.study import exam_questions, hold, prompts


@pytest.mark.parametrize("language", prompts.languages())
def test_every_language_has_many_and_none_is_the_exams(language: str) -> None:
    made = hold.prompts(language, 10_000, 7)
    assert len(made) == len(set(made)) == 256
    assert all("{" not in prompt for prompt in made)
    assert not {prompt.casefold() for prompt in made} & {
        prompt.casefold() for prompt in exam_questions.neutral_prompts()
    }


def test_the_seed_draws() -> None:
    assert hold.prompts("en", 20, 7) == hold.prompts("en", 200, 7)[:20] != hold.prompts("en", 20, 8)
    assert hold.prompts("it", 5, 7) == hold.prompts("en", 5, 7)
