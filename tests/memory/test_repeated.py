"""Operations on meta tensors answered from memory: the same tensors, and the same bytes of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from qlora.memory import repeated, simulate
from qlora.memory.repeated import RepeatedOperations
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config

META = torch.device("meta")
aten = torch.ops.aten


class Counting:
    """An operation that counts how often it is asked."""

    def __init__(self, func: Any) -> None:
        self.func, self.asked, self._schema = func, 0, func._schema

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return self.func(*args, **kwargs)


class AskingEachTime(RepeatedOperations):
    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def asked(func: Any, *questions: tuple[Any, ...]) -> tuple[int, list[Any]]:
    """How often it was asked for these questions, and the answers."""
    counting, answering = Counting(func), RepeatedOperations()
    answers = [answering.call(counting, question, {}) for question in questions]
    return counting.asked, answers


def test_what_was_asked_before_is_not_asked_again_and_is_a_tensor_of_its_own() -> None:
    left, right = empty(4, 8).t(), empty(8, 1, dtype=torch.bfloat16)
    count, (first, second, third) = asked(aten.add.Tensor, (left, right), (left, right), (empty(8, 4), right))
    assert count == 2
    for found in (second, first):
        assert (found.shape, found.stride(), found.dtype) == ((8, 4), (1, 8), torch.float32)
    assert third.stride() == (4, 1)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_numbers_of_another_type_are_another_question() -> None:
    """1, 1.0 and True are equal; what they make of whole numbers is not."""
    whole = empty(3, dtype=torch.int64)
    count, found = asked(aten.mul.Tensor, (whole, 1), (whole, 1.0), (whole, True), (whole, 1.0))
    assert count == 3
    assert [one.dtype for one in found] == [torch.int64, torch.float32, torch.int64, torch.float32]


@pytest.mark.parametrize(
    ("func", "question"),
    [
        (aten.view.default, (empty(4, 8), [8, 4])),
        (aten._unsafe_view.default, (empty(4, 8), [32])),  # whose schema does not say that it is a view
        (aten.add_.Tensor, (empty(2), 1.0)),
        (aten.split.Tensor, (empty(4, 2), 2)),
    ],
)
def test_what_lies_in_what_is_given_does_so_each_time(func: Any, question: tuple[Any, ...]) -> None:
    count, (_, second) = asked(func, question, question)
    assert count == 2
    given = question[0].untyped_storage()._cdata
    assert all(one.untyped_storage()._cdata == given for one in (second if isinstance(second, list) else [second]))


def test_what_writes_into_its_first_operand_is_checked_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(aten.addmm_.default)
    monkeypatch.setattr(repeated, "IN_PLACE", {counting})
    answers = RepeatedOperations()
    into, left, right = empty(4, 8), empty(4, 2), empty(2, 8)
    for _ in range(3):
        assert answers.call(counting, (into, left, right), {}) is into
    assert counting.asked == 1
    for _ in range(2):  # what is wrong is so each time
        with pytest.raises(RuntimeError):
            answers.call(counting, (into, left, empty(3, 8)), {})
    real = torch.zeros(1, 1)
    for _ in range(2):
        answers.call(counting, (real, torch.ones(1, 1), torch.ones(1, 1)), {})
    assert real.item() == 2 and counting.asked == 5


def test_real_tensors_are_asked_each_time() -> None:
    count, (_, second) = asked(aten.add.Tensor, (torch.ones(2), 1.0), (torch.ones(2), 1.0))
    assert count == 2 and second.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("family", "kind", "target"),
    [
        ("llama", "nf4", "cuda"),
        pytest.param("gemma2", "fp4", "cpu", marks=pytest.mark.slow),
        pytest.param("phi3", "none", "cuda", marks=pytest.mark.slow),
    ],
)
def test_a_run_takes_the_same_bytes(family: str, kind: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_config(family, overrides={"num_hidden_layers": 5, "layer_types": None, "hidden_size": 128})
    quantization = QuantizationSection(type=kind)  # type: ignore[arg-type]
    workload = Workload(2, 64, optimizer="paged_adamw_8bit", samples=2, prompt_tokens=16, new_tokens=8)
    spec = ModelSpec(text, "tiny", LoraSection(r=4, dropout=0.1), quantization, target=target)
    remembering = Simulator(spec).run(workload)
    monkeypatch.setattr(simulate, "RepeatedOperations", AskingEachTime)
    assert Simulator(spec).run(workload) == remembering
