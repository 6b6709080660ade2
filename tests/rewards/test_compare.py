"""When an answer is the one that was wanted."""

from __future__ import annotations

from qlora.rewards.compare import same_answer, without_thoughts


def test_an_answer_is_compared_without_thoughts_case_or_forms_of_letters() -> None:
    assert same_answer("<think>hm</think> Zürich ", "zu\u0308rich") and not same_answer("Zurich", "Zürich")
    assert without_thoughts("<think>hm</think> It.").strip() == "It."
