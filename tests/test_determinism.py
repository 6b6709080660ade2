"""Exact kernels for as long as a run lasts: torch's settings, what has no exact form, and putting back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qlora import determinism, device, numerics
from qlora.events import Recorder
from qlora.numerics import Numerics

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def settings() -> tuple[Any, ...]:
    memory: Any = torch.utils.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *mode, memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process computes on a GPU, as far as it is asked; and what the user has set is nothing of ours."""
    monkeypatch.setattr(device, "current", lambda: CARD)
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)


def test_a_run_on_a_gpu_is_asked_to_be_exact_and_all_is_put_back(card: None) -> None:
    before, filters = settings(), list(warnings.filters)
    with pytest.raises(KeyError), determinism.for_run(True, Recorder()):
        assert settings() == (True, True, False, False)
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
        raise KeyError
    assert settings() == before and determinism.WORKSPACE not in os.environ and warnings.filters == filters


@pytest.mark.parametrize(("asked", "where"), [(False, CARD), (True, CPU)])
def test_else_nothing_is_set(asked: bool, where: torch.device, card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is torch asked to: that imports the whole of inductor, a second of each run on a CPU."""
    monkeypatch.setattr(device, "current", lambda: where)
    before, asks = settings(), []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: asks.append(where))
    with determinism.for_run(asked, Recorder()):
        assert settings() == before
        assert determinism.exactly(settings, lambda: None, where, Recorder()) == before
    assert not asks and determinism.WORKSPACE not in os.environ


def test_what_the_user_has_set_for_cublas_stays(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    monkeypatch.setattr(device, "has_started", lambda: True)
    recorder = Recorder()
    with determinism.for_run(True, recorder):
        assert os.environ[determinism.WORKSPACE] == ":16:8"
    assert os.environ[determinism.WORKSPACE] == ":16:8" and not recorder.events


def test_a_process_that_used_the_gpu_before_is_told(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_started", lambda: True)
    recorder = Recorder()
    with determinism.for_run(True, recorder):
        pass
    (notice,) = recorder.of("notice")
    assert "CUBLAS_WORKSPACE_CONFIG" in notice.as_dict()["message"] and ":4096:8" in notice.as_dict()["message"]


def test_a_step_is_in_the_strict_mode_and_what_stands_around_it_is_not(card: None) -> None:
    """In the mode that warns, attention keeps its atomics (torch's attention_backward.cu)."""
    with determinism.for_run(True, Recorder()):
        assert determinism.exactly(settings, lambda: None, CARD, Recorder())[:2] == (True, False)
        assert settings()[:2] == (True, True)


def missing(kind: str) -> str:
    if kind == "cublas":  # torch's words, aten/src/ATen/Context.cpp
        return (
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
            "CuBLAS and you have CUDA >= 10.2."
        )
    return (
        f"{kind} does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    )


@pytest.mark.parametrize(("kind", "named"), [("cumsum_cuda_kernel", "cumsum_cuda_kernel"), ("cublas", "CuBLAS")])
def test_without_an_exact_form_the_work_is_done_again_and_said_once(kind: str, named: str, card: None) -> None:
    recorder, undone, tries = Recorder(), [], []

    def work() -> str:
        tries.append(settings()[:2])
        if tries[-1] == (True, False):
            raise RuntimeError(missing(kind))
        return "done"

    with determinism.for_run(True, recorder), numerics.in_force(Numerics(deterministic=True)):
        for _ in range(2):
            assert determinism.exactly(work, lambda: undone.append(True), CARD, recorder) == "done"
        found = numerics.of_run()
        assert found is not None and found.deterministic is False
        assert determinism.promise(CARD) == determinism.TO_ROUNDING
    assert tries == [(True, False), (False, False), (False, False)] and undone == [True]
    (notice,) = recorder.of("notice")
    assert notice.as_dict()["message"].startswith(f"{named} has no exact form")


def test_any_other_error_is_the_works_own(card: None) -> None:
    def work() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    with determinism.for_run(True, Recorder()):
        with pytest.raises(RuntimeError, match="illegal"):
            determinism.exactly(work, lambda: None, CARD, Recorder())
        assert settings()[:2] == (True, True)


def test_torchs_advice_in_the_mode_that_warns_reaches_nobody(card: None) -> None:
    with determinism.for_run(True, Recorder()):
        warnings.warn("Flash Attention defaults to a non-deterministic algorithm. To explicitly …", UserWarning, 1)
        with pytest.raises(UserWarning):  # the tests' filter makes an error of every other
            warnings.warn("something else", UserWarning, 1)


def test_the_plan_says_what_a_resumed_run_equals() -> None:
    assert determinism.promise(CARD) is None
    for asked, where, said in ((True, CARD, None), (False, CARD, "to rounding"), (False, CPU, "on a CPU")):
        with numerics.in_force(Numerics(deterministic=asked)):
            found = determinism.promise(where)
            assert found is None if said is None else said in (found or "")
