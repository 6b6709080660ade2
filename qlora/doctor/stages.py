"""In a process of its own: what may crash is tried, one stage after the other, each answered by a line of JSON.

A broken library may raise anything, print anything, hang or end the process. The parent (`doctor/trial.py`) knows by
the lines that came which stage did so, and starts another process for those behind it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from qlora import device as hardware
from qlora.errors import QloraError, foreign_failures

if TYPE_CHECKING:
    import torch

Answer = Mapping[str, Any]
SIDE = 256  # of the matrices that are multiplied
BLOCK = 64  # values of NF4 that share a scale
PAGED_BYTES = 4 << 20
PINNED_WORDS = 1 << 20  # of 8 bytes
LOCKED_BYTES = 1 << 20
# The 16 values of NF4 (QLoRA, arXiv:2305.14314, appendix E), written out again: bitsandbytes is what is under test.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Stage:
    """`needs` are stages without which this one says nothing of its own; it may take `seconds`."""

    needs: tuple[str, ...]
    seconds: float
    run: Callable[[], Answer]
    on_device: bool = False


def serve(names: Sequence[str], settle: Callable[[], Sequence[str]]) -> None:
    """Try these stages in their order. `settle` chooses the device before anything computes, and says what it chose."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    settled = cache(settle)
    failed: set[str] = set()
    for name in names:
        missing = [need for need in STAGES[name].needs if need in failed]
        said = {"needs": missing[0]} if missing else tried(partial(_tried_on, STAGES[name], settled))
        if "answer" not in said:
            failed.add(name)
        answers.write(json.dumps({"stage": name, **said}) + "\n")
        answers.flush()


def _tried_on(stage: Stage, settled: Callable[[], Sequence[str]]) -> Answer:
    """A process that goes on behind a crash chooses its device again."""
    notices = list(settled()) if stage.on_device else []
    return {**stage.run(), "notices": notices}


def tried(run: Callable[[], Answer]) -> dict[str, Any]:
    """What a stage answers, or why it has none: {"answer": …}, or {"failure": …, "mend": …}."""
    try:
        with warnings.catch_warnings(), foreign_failures(trial=True) as failure:
            warnings.simplefilter("ignore")
            return {"answer": dict(run())}
    except QloraError as error:
        return {"failure": error.what, "mend": error.hint}
    return {"failure": f"{type(failure.error).__name__}: {failure.reason}"}


# --- what is tried ---------------------------------------------------------------------------------------------------


def _torch() -> Answer:
    import torch

    assert int(torch.ones(3).sum()) == 3
    return {"version": str(torch.__version__), "threads": torch.get_num_threads()}


def _device() -> Answer:
    there = hardware.current()
    answer = {"name": hardware.name_of(there), "on_card": hardware.is_card(there)}
    answer |= {"may_spill": hardware.may_spill(), "computes_bf16": hardware.computes_bf16(there)}
    if not answer["on_card"]:
        return answer
    card = hardware.card()
    figures = {} if card is None else {"free_bytes": card.free_bytes, "total_bytes": card.total_bytes}
    return {**answer, **figures, "capability": ".".join(map(str, hardware.capability(there)))}


def _bf16() -> Answer:
    import torch

    there = hardware.current()
    dtype = torch.bfloat16 if hardware.computes_bf16(there) else torch.float16
    left, right = (_random(SIDE, seed).to(there, dtype) for seed in (1, 2))
    exact = left.float() @ right.float()
    return {"apart": float((left @ right - exact).norm() / exact.norm()), "dtype": str(dtype)}


def _bitsandbytes() -> Answer:
    from qlora.third_party import import_bitsandbytes

    library = import_bitsandbytes()
    native = library.cextension.lib
    return {"version": str(library.__version__), "native": "Mock" not in type(native).__name__}


def _nf4() -> Answer:
    """A weight there and back by bitsandbytes, beside the paper's table applied by hand."""
    from qlora.third_party import import_bitsandbytes

    functional, there = import_bitsandbytes().functional, hardware.current()
    weight = _random(SIDE, 3)
    with hardware.on_default_stream(there):
        codes, state = functional.quantize_4bit(weight.to(there), quant_type="nf4", blocksize=BLOCK)
        back = functional.dequantize_4bit(codes, state)
    back, wanted = back.cpu().float(), by_the_paper(weight)
    return {"apart": float((back - wanted).norm() / wanted.norm()), "bytes": int(codes.numel()), "values": SIDE * SIDE}


def by_the_paper(weight: torch.Tensor) -> torch.Tensor:
    """Each value as the nearest of NF4's, times the largest magnitude of its block; float32, of the weight's shape."""
    import torch

    blocks = weight.float().view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-38)
    table = torch.tensor(NF4)
    nearest = (blocks.div(scales).unsqueeze(-1) - table).abs().argmin(dim=-1)
    return (table[nearest] * scales).view_as(weight)


def _paged() -> Answer:
    """A real allocation that the driver may move: written by the GPU, read by the host, given back."""
    from qlora.flat.managed import ManagedMemory, why_not
    from qlora.third_party import import_bitsandbytes

    there = hardware.current()
    if why := why_not(there, PAGED_BYTES):
        return {"why_not": why, "on_card": hardware.is_card(there)}
    memory = ManagedMemory(PAGED_BYTES, there)
    try:
        memory.tensor.fill_(1)
        memory.prefetch()
        import_bitsandbytes().functional.fill(memory.tensor, 7)
        hardware.synchronize(there)
        wrong = int((memory.tensor != 7).sum())
    finally:
        memory.free()
    return {"bytes": PAGED_BYTES, "wrong": wrong, "on_card": True}


def _pinned() -> Answer:
    """Whether memory of the host can be locked: for copies to a GPU by CUDA, and else by the system."""
    there = hardware.current()
    pinned = None
    if hardware.is_card(there):
        pinned = bool(hardware.host_block(PINNED_WORDS, there).is_pinned())
    return {"pinned": pinned, "locked": locks(LOCKED_BYTES), "limit": lock_limit()}


def lock_limit() -> int | None:
    """Bytes that this process may lock (RLIMIT_MEMLOCK, getrlimit(2)); -1 without a limit, None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return -1 if soft == resource.RLIM_INFINITY else int(soft)


def locks(count: int) -> bool | None:
    """Whether `count` bytes can be locked in RAM (mlock(2)); None where the system has no such call."""
    lock = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "mlock", None)
    if lock is None:
        return None
    page = mmap.mmap(-1, count)
    return int(lock(ctypes.byref(ctypes.c_char.from_buffer(page)), ctypes.c_size_t(count))) == 0


def _imports(package: str, *names: str) -> Callable[[], Answer]:
    """These names are taken: packages that load lazily import what is behind a name when it is asked for."""

    def run() -> Answer:
        module = importlib.import_module(package)
        for name in names:
            getattr(module, name)
        return {"version": importlib.metadata.version(package)}

    return run


def _llama_cpp() -> Answer:
    from qlora.export.llama_cpp.library import find_library, find_llama

    found = find_llama()
    if found is None:
        return {"package": None}
    find_library()  # opens it, and asks its blocks' sizes
    package = {"llama_cpp": "llama-cpp-python"}.get(found[0], found[0])
    return {"package": package, "version": importlib.metadata.version(package)}


def _random(side: int, seed: int) -> torch.Tensor:
    import torch

    return torch.randn(side, side, generator=torch.Generator().manual_seed(seed)).bfloat16()


# In the order in which they are tried. From a cold disk torch takes half a minute to be imported.
STAGES: dict[str, Stage] = {
    "torch": Stage((), 120, _torch),
    "device": Stage(("torch",), 60, _device, on_device=True),
    "bf16": Stage(("torch", "device"), 30, _bf16, on_device=True),
    "bitsandbytes": Stage(("torch",), 60, _bitsandbytes),
    "nf4": Stage(("torch", "device", "bitsandbytes"), 30, _nf4, on_device=True),
    "paged": Stage(("torch", "device", "bitsandbytes"), 30, _paged, on_device=True),
    "pinned": Stage(("torch", "device"), 30, _pinned, on_device=True),
    "transformers": Stage(("torch",), 60, _imports("transformers", "AutoModelForCausalLM", "PreTrainedTokenizerFast")),
    "accelerate": Stage(("torch",), 60, _imports("accelerate", "Accelerator")),
    "peft": Stage(
        ("torch", "transformers", "accelerate", "bitsandbytes"), 60, _imports("peft", "LoraConfig", "PeftModel")
    ),
    "datasets": Stage(("torch",), 60, _imports("datasets", "Dataset")),
    "llama.cpp": Stage((), 30, _llama_cpp),
}
