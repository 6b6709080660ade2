"""Each way in which memory that ran out is reported is known as one, and no other error is taken for it.

The texts are what the libraries write: torch's C++ (c10/core/impl, aten/src/ATen/cuda, c10/cuda), CUDA's and HIP's
error strings, Triton's driver, safetensors' and Windows' words.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import torch

from qlora import out_of_memory as oom

ASYNCHRONOUS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
TORCHS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 GiB of which 1.10 GiB is free."
)
RAN_OUT = [
    torch.OutOfMemoryError(TORCHS),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.98 GiB"),
    torch.AcceleratorError("CUDA error: out of memory" + ASYNCHRONOUS),
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA error: out of memory" + ASYNCHRONOUS),  # torch before 2.8
    RuntimeError("CUDA driver error: out of memory"),  # with expandable segments
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, computeDesc )`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"),
    RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please report'
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allo"),
    RuntimeError("unable to mmap 1048576 bytes from file </dev/shm/x>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    OSError("Die Auslagerungsdatei ist zu klein, um diesen Vorgang durchzuführen. (os error 1455)"),
]
ANOTHER = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("CUDA error: an illegal memory access was encountered" + ASYNCHRONOUS),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + ASYNCHRONOUS),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + ASYNCHRONOUS),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb )`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx( handle, opa, opb )`"),
    RuntimeError("out of resource: shared memory, Required: 114688, Hardware limit: 101376."),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("memory.limit"),
    KeyError("out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_memory_that_ran_out(error: BaseException) -> None:
    assert oom.is_out_of_memory(error) and oom.gpu_fault(error) is None
    assert oom.reason(error) and "\n" not in oom.reason(error)


@pytest.mark.parametrize("error", ANOTHER, ids=str)
def test_any_other_error(error: BaseException) -> None:
    assert not oom.is_out_of_memory(error)


def test_what_torch_really_raises_on_this_machine() -> None:
    for work in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            work()
        assert oom.is_out_of_memory(caught.value)
    error = torch.AcceleratorError("an error of which only the code is known")
    error.error_code = 2  # type: ignore[attr-defined]
    assert oom.is_out_of_memory(error)


def raised(work: Callable[[], None]) -> BaseException:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


def test_an_error_that_another_has_become() -> None:
    def wrapped() -> None:
        try:
            raise torch.OutOfMemoryError(TORCHS)
        except RuntimeError as error:
            raise ValueError("this layer cannot be computed") from error

    def met_on_the_way() -> None:
        try:
            raise torch.OutOfMemoryError(TORCHS)
        except RuntimeError:
            raise ValueError("this layer cannot be computed")  # noqa: B904

    def replaced() -> None:
        try:
            raise torch.OutOfMemoryError(TORCHS)
        except RuntimeError:
            raise ValueError("what is wrong is another thing") from None

    def of_a_group() -> None:
        raise ExceptionGroup("two threads", [ValueError("x"), ExceptionGroup("one", [MemoryError()])])

    def asked_to_end() -> None:
        try:
            raise torch.OutOfMemoryError(TORCHS)
        except RuntimeError:
            raise KeyboardInterrupt from None

    assert oom.is_out_of_memory(raised(wrapped)) and oom.reason(raised(wrapped)) == "Tried to allocate 2.00 GiB"
    assert oom.is_out_of_memory(raised(met_on_the_way)) and oom.is_out_of_memory(raised(of_a_group))
    assert not oom.is_out_of_memory(raised(replaced))
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = torch.OutOfMemoryError(TORCHS)
    assert not oom.is_out_of_memory(interrupt)
    circle = ValueError("a")
    circle.__context__ = other = ValueError("b")
    other.__context__ = circle
    assert not oom.is_out_of_memory(circle)


def test_the_reason_says_what_was_asked_for() -> None:
    assert oom.reason(torch.OutOfMemoryError(TORCHS)) == "Tried to allocate 2.00 GiB"
    host = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes. Error code 12"
    assert oom.reason(RuntimeError(host)) == "Tried to allocate 4.00 GiB"
    assert oom.reason(MemoryError()) == "the machine has no memory left"
    assert oom.reason(RAN_OUT[2]) == "CUDA error: out of memory"


@pytest.mark.parametrize(
    ("error", "text", "cure"),
    [
        (ANOTHER[2], "an illegal memory access was encountered", "CUDA_LAUNCH_BLOCKING"),
        (ANOTHER[3], "uncorrectable ECC error", "nvidia-smi -q -d ECC"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "launch failure", "the driver lost it"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "assert triggered", "LAUNCH_BLOCKING"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "no kernel", "build of"),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), "misaligned address", "LAUNCH_BLOCKING"),
        (ANOTHER[4], "CUBLAS_STATUS_EXECUTION_FAILED", "LAUNCH_BLOCKING"),
        (RuntimeError("HIP error: invalid argument"), "invalid argument", "LAUNCH_BLOCKING"),
    ],
)
def test_a_gpu_that_failed_says_how_and_what_to_do(error: BaseException, text: str, cure: str) -> None:
    fault = oom.gpu_fault(error)
    assert fault is not None and text in fault[0] and cure in fault[1] and "\n" not in fault[0]


@pytest.mark.parametrize(
    "text",
    [
        "an illegal memory access was encountered",
        "misaligned address",
        "operation not supported on global/shared address space",
        "unspecified launch failure",
        "the launch timed out and was terminated",
        "uncorrectable ECC error encountered",
        "device-side assert triggered",
        "GPU is lost",
        "unknown error",
    ],
)
def test_a_gpu_that_is_lost_computes_nothing_more(text: str) -> None:
    assert oom.gpu_is_lost(torch.AcceleratorError(f"CUDA error: {text}"))
    assert oom.gpu_is_lost(RuntimeError(f"Triton Error [CUDA]: {text}"))
    assert not oom.gpu_is_lost(RuntimeError(text)), "nobody says that it is a GPU's"


def test_no_other_error_is_a_gpus() -> None:
    assert oom.gpu_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert oom.gpu_fault(ValueError("CUDA error: x")) is None


def test_the_last_line_of_a_process() -> None:
    assert oom.is_report("MemoryError") and oom.is_report("torch.OutOfMemoryError: CUDA out of memory. Tried to")
    assert oom.is_report("ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 4294967296")
    assert not oom.is_report("ValueError: its header cannot be read")
