"""Decoder layers through torch's compiler: one graph for all layers that are alike, forth and back.

A layer's own forward is what is compiled, inside of what runs and recomputes it (`step/layerwise.py`), whole or not at
all (`fullgraph`), for rows of the run's one width: whether a layer is compiled must follow from the micro-batch alone,
or a resumed run would be another one. Evaluation, answers and rows of another width go through it as it is.

On a card "auto" measures five steps of each kind and keeps what is faster; what was decided is recorded with the run's
numbers, and a resumed run takes it.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from qlora import device as hardware
from qlora import disk, numerics
from qlora.errors import HardwareError, ModelError, foreign_failures
from qlora.events import Notice, Sink
from qlora.model.compiled_attention import behind
from qlora.model.reclassed import called_as
from qlora.model.weight_sharding import ShardStore
from qlora.model.weight_streaming import inside
from qlora.numerics import Numerics
from qlora.step.layerwise import recomputable

FOLDER = "compiled"  # of the cache: inductor's graphs and kernels, which it reads back by a hash of all they depend on
STEPS = 5
# Graphs of one layer: forth, back, and back of the first layer, whose input has no gradient; of micro-batches of
# different numbers of rows (the last of an epoch, and halved ones) each the same.
MOST_GRAPHS = 64
# What torch's compiler says of what it does itself while it makes a graph: it looks at gradients of its inputs, and
# makes an object of the class of functions.
_ABOUT_ITSELF = (
    "The .grad attribute of a Tensor that is not a leaf",
    "<class 'torch.autograd.function.Function'> should not be instantiated",
)
TOPIC = "compile"
BACKEND = "inductor"


def choose(wanted: bool | str, device: torch.device, recorded: Numerics | None) -> bool | None:
    """Whether a run's layers are compiled; None where that is to be measured. A run that goes on takes what it began
    with, where that exists here. Raises HardwareError where it is asked for and cannot be."""
    lack = lack_of(device)
    if wanted is True and lack:
        raise HardwareError(f"model.compile = true: {lack}", 'install it, or set model.compile = "auto"')
    if wanted is not True and recorded is not None:
        return bool(recorded.compiled) and not lack
    if wanted == "auto" and hardware.is_card(device) and not lack:
        return None
    return wanted is True


def lack_of(device: torch.device) -> str:
    """What torch's compiler has no use of here: Triton on a card, a C++ compiler on a CPU; "" where nothing lacks."""
    if hardware.is_card(device):
        return (
            "" if find_spec("triton") is not None else "torch's compiler needs Triton on a GPU, which is not installed"
        )
    compiler = os.environ.get("CXX") or "g++"
    found = any(shutil.which(one) for one in (compiler, "clang++", "c++", "cl"))
    return "" if found else "torch's compiler needs a C++ compiler on a CPU, and finds none"


def _why_not(causal_lm: Any, width: int) -> str:
    if not width:
        return "rows have many widths, and each would be compiled anew"
    held = inside(causal_lm)
    if held is not None and isinstance(held.store, ShardStore):  # others would have to gather while one compiles
        return "its layers are shared by several processes"
    return "" if recomputable(causal_lm) else "it has no layers of one kind"


def settle(causal_lm: Any, step: Callable[[], None], width: int, sink: Sink) -> None:
    """Before the first step: compile the layers where that was decided, or measure whether it pays. `step` does one, in
    rows of `width` tokens (0: rows differ); whatever it changes is put back by the caller."""
    run = numerics.of_run()
    if run is None or run.compiled is False:
        return
    where = torch.device(causal_lm.device)
    if why := _why_not(causal_lm, width):
        if run.compiled:
            raise ModelError(f"model.compile = true: {why}", "set data.packing = true, or model.compile = false")
        _decide(False, why, sink)
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(disk.cache_dir() / FOLDER))
    plain = [] if run.compiled else _timed(step, where)
    with foreign_failures(trial=True) as failure:
        put_in(causal_lm, width)
        (first, *_), ours = _timed(step, where, 1), [] if run.compiled else _timed(step, where)
    if failure.error:
        take_out(causal_lm)
        if run.compiled:
            what = f"model.compile = true: torch's compiler fails on this model ({failure.reason[:120]})"
            raise ModelError(what, "set model.compile = false") from failure.error
        _decide(False, f"torch's compiler fails on this model ({failure.reason[:120]})", sink)
    elif run.compiled:
        sink.emit(Notice(TOPIC, f"layers go through torch's compiler: {first:.1f} s with the first step"))
    else:
        faster = median(ours) < median(plain)
        if not faster:
            take_out(causal_lm)
        said = f"{STEPS} steps of {median(ours):.3f} s each compiled, {median(plain):.3f} s as they are"
        _decide(faster, f"{said}; compiling took {max(0.0, first - median(ours)):.1f} s", sink)


def put_in(causal_lm: Any, width: int) -> None:
    """Has the layers of a model compiled when they are first trained, for rows of `width` tokens."""
    import torch._dynamo

    for about in _ABOUT_ITSELF:
        warnings.filterwarnings("ignore", about)
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in recomputable(causal_lm):
        if not isinstance(layer, Compiled):
            kind: Any = type(layer)
            layer.__class__ = _compiled(kind, BACKEND)
        layer.compiled_width = width


def take_out(causal_lm: Any) -> None:
    for layer in recomputable(causal_lm):
        if isinstance(layer, Compiled):
            layer.__class__ = type(layer).kind


class Compiled:
    """What all compiled layers are, whatever else; `kind` is the class that one was of."""

    kind: Any
    compiled_width: int


@lru_cache(16)
def _compiled(kind: Any, backend: str) -> Any:
    plain = getattr(kind.forward, "__wrapped__", kind.forward)  # without transformers' own checkpointing around it
    whole: Any = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)

    class CompiledLayer(kind, Compiled):  # type: ignore[misc]
        def forward(self, hidden_BSD: Any, *args: Any, **named: Any) -> Any:
            if not self.training or hidden_BSD.shape[1] != self.compiled_width:
                return plain(self, hidden_BSD, *args, **named)
            # Whether it has a gradient would be another graph, also where there is none to be made.
            hidden_BSD = hidden_BSD if torch.is_grad_enabled() else hidden_BSD.detach()
            known = {name: behind(value) for name, value in named.items()}
            return whole(self, hidden_BSD, *map(behind, args), **known)

    CompiledLayer.kind = kind
    return called_as(kind, CompiledLayer)


def _timed(step: Callable[[], None], device: torch.device, times: int = STEPS) -> list[float]:
    """Seconds of each."""
    found = []
    for _ in range(times):
        hardware.synchronize(device)
        started = time.monotonic()
        step()
        hardware.synchronize(device)
        found.append(time.monotonic() - started)
    return found


def _decide(compiled: bool, why: str, sink: Sink) -> None:
    run = numerics.of_run()
    assert run is not None
    numerics.correct(run.model_copy(update={"compiled": compiled}))
    sink.emit(Notice(TOPIC, f"layers {'go' if compiled else 'do not go'} through torch's compiler: {why}"))
