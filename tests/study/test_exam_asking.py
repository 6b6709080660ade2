"""The run's own model as the one who answers: adapters off and on, and how far the two are apart."""

from __future__ import annotations

import pytest
import torch

from qlora.model import adapters
from qlora.recipe.sections import LoraSection
from qlora.study import exam_asking
from qlora.study.exam_asking import TeacherAsker
from tests.families import make_config, make_model
from tests.study.cases import tiny_teacher

TEXTS = ["Describe a cat.", "How heavy is the pump?", "Why?"]


@pytest.fixture
def asker() -> TeacherAsker:
    model = make_model(make_config("llama", overrides={"max_position_embeddings": 512}))
    tuned = adapters.attach(model, LoraSection(r=4, alpha=8), seed=0)
    return TeacherAsker(tiny_teacher(tuned), "chat", "chat", "base", "tuned")


def move(asker: TeacherAsker) -> None:
    """Adapters as training leaves them: not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in asker.teacher.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def test_a_model_that_learnt_nothing_is_its_base(asker: TeacherAsker) -> None:
    assert asker.base(TEXTS, 6) == asker.tuned(TEXTS, 6)
    assert asker.nats(TEXTS) == [0.0] * 3


def test_nats_are_the_divergence_along_the_base_s_answer(asker: TeacherAsker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exam_asking, "NATS_TOKENS", 5)
    before = asker.base(TEXTS, 6)
    move(asker)
    assert asker.base(TEXTS, 6) == before
    teacher, model = asker.teacher, asker.teacher.model
    expected = []
    for text in TEXTS:  # one forward of all, every position, by the definition
        (written,) = teacher.greedy("chat", [text], 5)
        ids = torch.tensor([[*teacher.ids("chat", text), *written.token_ids]])
        with torch.no_grad():
            q = model(input_ids=ids, use_cache=False).logits[0].float().softmax(-1)
            with model.disable_adapter():
                p = model(input_ids=ids, use_cache=False).logits[0].float().softmax(-1)
        nats = [sum(p[at] * (p[at] / q[at]).log()).item() for at in range(-len(written.token_ids) - 1, 0)]
        expected.append(sum(nats) / len(nats))
    found = asker.nats(TEXTS)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5) and min(found) > 0.01
