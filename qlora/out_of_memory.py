"""How memory that ran out is reported, and how a GPU that failed: by Python, torch, CUDA, its libraries, ROCm, Triton.

Only torch's own allocator has a class for it. Whatever else asks the driver for memory (a kernel that is loaded when it
is first used, pinned host memory, the workspace of a library) reports by a text in a RuntimeError. Nothing here imports
torch: its classes are known by their names, so that a command can ask before torch is there.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from qlora.units import gib

# Texts of what reports that memory ran out. None of them stands in the text of another error of its library.
_TEXTS = (
    r"\bout of memory\b",  # cudaGetErrorString(cudaErrorMemoryAllocation); torch's allocators; Triton Error [CUDA]
    r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|hipErrorMemoryAllocation",
    r"(?:CUBLAS|CUSOLVER|CUSPARSE|CUDNN|HIPBLAS|HIPSOLVER|HIPSPARSE|NVRTC)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED",
    r"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    r"CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED",  # cuDNN 9
    r"rocblas_status_memory_error|miopenStatusAllocFailed",
    # A library's handle is made when it is first used; when that fails it has found no memory for its context
    # (pytorch's forum and trackers say so of hundreds of cases; a context that is dead fails at its next call anyway).
    r"(?:CUBLAS|CUSOLVER|CUDNN|HIPBLAS)_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)\b.*\bwhen calling `?\w+Create\w*\(",
    r"CUDNN_STATUS_NOT_INITIALIZED",
    # torch asks NVML how full the card is when it words its own error, and stumbles where there is none (Jetson, MIG):
    # pytorch/pytorch#112377.
    r"NVML_SUCCESS == .* INTERNAL ASSERT FAILED.*CUDACachingAllocator",
    r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",  # c10/core/impl/alloc_cpu.cpp
    r"\bcannot allocate memory\b",  # strerror(ENOMEM), in torch's "unable to mmap … bytes"
    r"\bstd::bad_alloc\b|\bbad allocation\b",
    r"failed to allocate (?:\w+ )?buffer|insufficient memory \(attempted",  # llama.cpp's ggml
    r"\bos error (?:12|1455)\b",  # safetensors' words for ENOMEM, and for Windows' page file that is too small
)
_RAN_OUT = re.compile("|".join(_TEXTS), re.IGNORECASE | re.DOTALL)
# Windows: ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT (winerror.h).
_WINDOWS_CODES = {8, 14, 1455}
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation and hipErrorOutOfMemory (driver_types.h, hip_runtime_api.h)
_ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_REASON_CHARACTERS = 120

_GPU_FAILED = re.compile(
    r"\b(?:CUDA|HIP)(?: driver)? error: (?P<text>[^\n]*)"
    r"|Triton Error \[(?:CUDA|HIP)\]: (?P<triton>[^\n]*)"
    r"|(?P<library>\b(?:CUBLAS|CUSOLVER|CUDNN|CUSPARSE|HIPBLAS)_STATUS_\w+)"
)
_LOST = (
    r"device is lost|fallen off the bus|unspecified launch failure|launch timed out|device.* not ready|unknown error"
)
# Texts of cudaGetErrorString after which each later call of the process fails too (CUDA Runtime API, cudaError_t: 214,
# 220, 700 to 719), and of the driver where the card itself is gone. After any other, such as of a launch that was
# refused, CUDA goes on.
_LASTS = (
    r"uncorrectable|illegal (?:memory access|address|instruction)|misaligned address|invalid program counter"
    r"|on global/shared address space|device-side assert|hardware stack error|is lost|busy or unavailable"
)
_FOR_GOOD = re.compile(f"{_LASTS}|{_LOST}", re.IGNORECASE)
# What to do about a GPU that failed, by its text; the first that is found.
_CURES = (
    (r"\bECC\b", "its memory is damaged: nvidia-smi -q -d ECC shows where; restart the machine, then have it replaced"),
    (_LOST, "the driver lost it: its log (dmesg, the event viewer) says why; look at its heat and power, then restart"),
    (r"no kernel image", "this torch has no code for the GPU: install the build of torch that its maker names for it"),
)
_OTHER_CURE = "run it again; if it happens again, run it with CUDA_LAUNCH_BLOCKING=1 and report what that names"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in the error, in what it was raised from, or in one of a group.

    What asks the process to end is never that, whatever was under way.
    """
    return isinstance(error, Exception) and _source(error) is not None


def is_report(text: str) -> bool:
    """Whether a text, such as the last line of a process that died, says that memory ran out."""
    return bool(_RAN_OUT.search(text)) or text.strip().startswith("MemoryError")


def reason(error: BaseException) -> str:
    """What was asked for and not there, on one line: "Tried to allocate 2.00 GiB"."""
    source = _source(error) or error
    text = str(source)
    if asked := _ASKED_FOR.search(text):
        number, unit = asked[1].split()
        return f"Tried to allocate {gib(float(number)) if unit == 'bytes' else asked[1]}"
    if isinstance(source, MemoryError):
        return "the machine has no memory left"
    first = next((line for line in text.splitlines() if _RAN_OUT.search(line)), text)
    return " ".join(first.split())[:_REASON_CHARACTERS] or type(source).__name__


def gpu_fault(error: BaseException) -> tuple[str, str] | None:
    """What a GPU that failed has said, and what to do; None for any other error, and where memory ran out."""
    for one in _chain(error):
        found = _GPU_FAILED.search(str(one)) if isinstance(one, RuntimeError) else None
        named = _is(one, "AcceleratorError")
        if (found or named) and not is_out_of_memory(error):
            text = next(filter(None, found.groups()), "") if found else str(one).partition("\n")[0]
            cure = next((cure for pattern, cure in _CURES if re.search(pattern, text, re.IGNORECASE)), _OTHER_CURE)
            return " ".join(text.split())[:_REASON_CHARACTERS] or "no reason given", cure
    return None


def gpu_is_lost(error: BaseException) -> bool:
    """Whether the GPU, or this process's context on it, computes nothing any more; not where one kernel was refused."""
    fault = gpu_fault(error)
    return fault is not None and _FOR_GOOD.search(fault[0]) is not None


def _source(error: BaseException) -> BaseException | None:
    """The error of the chain by which memory ran out."""
    return next((one for one in _chain(error) if _ran_out(one)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, those of its group, and what each was raised from or while handling, as a traceback shows them."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        waiting += [before] if before is not None else []


def _ran_out(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _is(error, "OutOfMemoryError"):
        return True
    if isinstance(error, OSError):
        code = getattr(error, "winerror", None)
        return error.errno == errno.ENOMEM or code in _WINDOWS_CODES or "os error 1455" in str(error)
    if _is(error, "AcceleratorError") and getattr(error, "error_code", None) == _MEMORY_ALLOCATION:
        return True
    return isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error)))


def _is(error: BaseException, name: str) -> bool:
    """Whether it is torch's error of that name."""
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)
