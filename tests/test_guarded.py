"""Work that cannot be made smaller ends with exit 3 and what to change; what an error held is let go of."""

from __future__ import annotations

import weakref

import pytest
import torch

from qlora.errors import DoesNotFit, ModelError, TrainingStopped
from qlora.guarded import Attempt, Guarded


def test_memory_that_runs_out_is_exit_3_with_what_to_change() -> None:
    with (
        pytest.raises(DoesNotFit) as caught,
        Guarded("loading the base", "use a smaller one", lambda: "step 4 is saved"),
    ):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert caught.value.what.startswith("out of memory while loading the base: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    assert (caught.value.hint, caught.value.exit_code) == ("use a smaller one; step 4 is saved", 3)


def test_a_gpu_that_failed_is_exit_4_with_what_was_saved() -> None:
    with pytest.raises(TrainingStopped) as caught, Guarded("training", "lower lora.r", lambda: "step 4 is saved"):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")
    assert caught.value.what == "the GPU failed while training: uncorrectable ECC error encountered"
    assert caught.value.hint.endswith("; step 4 is saved") and "lora" not in caught.value.hint
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), ModelError("a", "b"), DoesNotFit("a", "b")])
def test_any_other_error_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, Guarded("training", "x"):
        raise error
    assert caught.value is error
    with pytest.raises(type(error)), Attempt():
        raise error


def test_an_attempt_holds_on_to_nothing() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        big = torch.ones(64)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    with Attempt() as memory:
        work()
    assert memory.reason == "Tried to allocate 2.00 GiB" and held[0]() is None
    with Attempt() as memory:
        pass
    assert memory.reason == ""
