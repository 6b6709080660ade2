"""The teacher is the base bit for bit while its adapters are off, and goes on in smaller batches without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFit
from qlora.events import Recorder
from qlora.model.adapters import attach, trainable
from qlora.recipe.sections import LoraSection
from qlora.stop import StopAsked, StopRequest
from qlora.study import generation
from qlora.study.prompts import prompts_for
from tests.families import make_config, make_model
from tests.study.cases import passage, tiny_teacher

PROMPTS = prompts_for("en")
TEXTS = [PROMPTS.answer("chat", passage(), f"How many years is the warranty number {n}?") for n in range(5)]


def adapted(seed: int | None) -> Any:
    """The tiny base with adapters: fresh ones without a seed, trained ones (at random) with one."""
    config = make_config("llama", overrides={"max_position_embeddings": 2048})
    model = attach(make_model(config), LoraSection(r=4), seed=1, dtype=torch.float32)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable(model).values():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def test_with_adapters_off_it_is_the_base_bit_for_bit() -> None:
    base, fresh, trained = tiny_teacher(), tiny_teacher(adapted(None)), tiny_teacher(adapted(3))
    ids = torch.tensor([base.ids("chat", text)[-60:] for text in TEXTS])
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        for teacher in (fresh, trained):
            with teacher.adapters_off():
                assert torch.equal(teacher.model.eval()(input_ids=ids).logits, expected)
    asked = base.greedy("chat", TEXTS, 6)
    answers = [row.token_ids for row in asked]
    assert [row.token_ids for row in trained.greedy("chat", TEXTS, 6)] == answers
    for mine, other in zip(base.score("chat", TEXTS, answers), trained.score("chat", TEXTS, answers), strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    assert base.sample("chat", TEXTS, range(5), 6, 0.8) == trained.sample("chat", TEXTS, range(5), 6, 0.8)
    tuned = trained.tuned("chat", TEXTS, 6)
    assert [row.token_ids for row in tuned] != answers, "adapters are on again"


def test_lines_end_with_their_line() -> None:
    teacher = tiny_teacher()
    newline = teacher.chat.tokenizer.encode("\n", add_special_tokens=False)[0]
    free = teacher._manner("chat", 4).ends
    ends = teacher._manner("lines", 4).ends
    assert newline in ends and newline not in free and free < ends
    assert all("\n" in teacher.chat.tokenizer.decode([token]) for token in ends - free)


def test_memory_that_runs_out_makes_batches_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, sizes = Recorder(), []
    expected = [row.token_ids for row in tiny_teacher().greedy("chat", TEXTS, 4)]

    def scarce(model: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generation.write(model, prompts, *rest)

    monkeypatch.setattr("qlora.study.teacher.write", scarce)
    teacher = tiny_teacher(sink=sink)
    teacher.at_once = 5
    assert [row.token_ids for row in teacher.greedy("chat", TEXTS, 4)] == expected
    assert sizes == [5, 2, 2, 1] and teacher.at_once == 2
    assert "2 questions at once" in sink.of("recovered")[0].as_dict()["message"]


def test_memory_that_never_suffices_ends_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("qlora.study.teacher.write", none)
    with pytest.raises(DoesNotFit, match="one question"):
        tiny_teacher().greedy("chat", TEXTS, 4)


def test_a_stop_is_honoured_before_the_next_token() -> None:
    stop = StopRequest()
    teacher = tiny_teacher(stop=stop)
    teacher.model.register_forward_pre_hook(lambda *_: stop.set())
    with pytest.raises(StopAsked):
        teacher.greedy("chat", TEXTS, 4)
