"""Memory that no tensor of ours shows, term by term, each with the source or the measurement that gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qlora.memory.hardware import Gpu
from qlora.model.base_cache.places import LEAST_BYTES
from qlora.recipe.sections import MemorySection
from qlora.units import MIB

# The CUDA context with lazily loaded kernels, after a step: 140.9 MiB on a T4 (40 multiprocessors) in each of 69
# published runs (PyPI fitcheck-llm 0.3.1, data/measurements); "around 400MB" on CUDA >= 11.7 (pytorch/pytorch#109888,
# a maintainer, of data centre cards with 108), 300 MB on another card (#107667). It grows with the multiprocessors: by
# the line through T4 and the former, cards of up to 12 GB (24 to 70 of them) have 140 to 255 MiB, larger ones 220 to
# 490.
CUDA_CONTEXT_TURING = (141 * MIB, 16 * MIB)
CUDA_CONTEXT_SMALL, SMALL_CARD_BYTES = (200 * MIB, 60 * MIB), 12 << 30
CUDA_CONTEXT_LARGE = (370 * MIB, 120 * MIB)

# cuBLAS takes its workspace from torch's allocator, once for the forward and once for the backward thread: 8.125 MiB
# each, 32 MiB from Hopper on (aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize); cublasLt's is as large from
# Hopper on and 1 MiB before (same file, _getWorkspaceSize).
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = (4096 * 2 + 16 * 8) * 1024, 4096 * 8 * 1024
CUBLASLT_BYTES, CUBLASLT_BYTES_HOPPER = 1 * MIB, 4096 * 8 * 1024
THREADS_WITH_CUBLAS = 2

# Resident memory of a process that trains on a GPU: 400 MiB of imports with the CPU build (python tools/bench/host.py)
# and 150 by its first step; the CUDA build maps its libraries and the driver's host side on top: about 1.5 GiB in
# pytorch/pytorch#113326 and #12873, not measured by us.
CUDA_HOST_BYTES = (550 + 1536) * MIB


def context_bytes(gpu: Gpu | None) -> tuple[int, int]:
    """What the driver keeps for a process on that card, and by how much it may be more."""
    if gpu is not None and gpu.capability < 80:
        return CUDA_CONTEXT_TURING
    small = gpu is not None and gpu.usable_bytes <= SMALL_CARD_BYTES
    return CUDA_CONTEXT_SMALL if small else CUDA_CONTEXT_LARGE


def workspace_terms(capability: int, deterministic: bool = False) -> Mapping[str, int]:
    """What libraries take on a GPU of `capability`, by name; deterministic runs fix cuBLAS' workspace at 8 x 4 MiB."""
    hopper = capability // 10 in (9, 10)  # not 12: consumer Blackwell has the workspace of Ampere and Ada
    cublas = CUBLAS_BYTES_HOPPER if hopper or deterministic else CUBLAS_BYTES
    cublaslt = CUBLASLT_BYTES_HOPPER if hopper else CUBLASLT_BYTES
    return {"cublas_workspace": THREADS_WITH_CUBLAS * (cublas + cublaslt)}


def snapshot_bytes(adapter: int, optimizer: int, pinned: bool) -> int:
    """Host memory of the copy that a thread writes while steps go on: adapters, fp32 masters, moments.

    Of `pinned` memory torch takes powers of two (aten/src/ATen/core/CachingHostAllocator.h): of the flat masters, which
    are twice as large as the bf16 adapters, of the flat moments, and of each of the adapters' tensors.
    """
    if not pinned:
        return adapter + optimizer
    masters = min(2 * adapter, optimizer)
    return 2 * adapter + sum(1 << max(0, flat - 1).bit_length() for flat in (masters, optimizer - masters) if flat)


def disk_bytes(adapter: int, optimizer: int, kept: int, merged: int) -> int:
    """Checkpoints (one more than are kept exists while a new one is published), the adapter, and merged models."""
    return (kept + 1) * (adapter + optimizer) + adapter + merged


def kept_base_bytes(memory: MemorySection, quantization: str, weights: int, values: int) -> int:
    """What the cache takes of a base of so many values, whose weights in their final form have `weights` bytes.

    Its files are taken to be in 16 bit, as nearly all are.
    """
    wanted = memory.cache is True or (memory.cache == "auto" and 2 * values >= LEAST_BYTES)
    return weights if wanted and quantization != "none" else 0


def merge_bytes(largest_values: int, rank: int) -> int:
    """Device memory of the merge: one weight in 4 bit, a block of its rows in float32 twice, and its two factors.

    export/merge.py goes through a weight in blocks of 4 Mi values; bitsandbytes dequantizes the block's bf16 copy.
    """
    side = math.isqrt(largest_values)
    block = min(largest_values, 1 << 22)
    return largest_values // 2 + largest_values * 4 // 64 + block * (2 + 4 + 4) + 2 * rank * side * 4
