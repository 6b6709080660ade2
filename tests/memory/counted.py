"""A real step on the CPU, with every allocation that torch's allocator reports, rounded as CUDA's would round it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qlora.batch import Batch
from qlora.events import Sinks
from qlora.memory.allocator import rounded
from qlora.memory.simulation import Workload
from qlora.memory.trace import LiveBytes
from qlora.model import adapters, load, lora_functions
from qlora.model.resolve import resolve
from qlora.objective_keys import ObjectiveKeys
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import head_loss
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.objectives import objective_of
from qlora.step.optimizer import AdapterOptimizer


@dataclass(frozen=True)
class Counted:
    """Bytes at the peak of a step by the profiler's allocation events, and by our own mode on real tensors."""

    by_profiler: int
    by_mode: int


def count_step(folder: Path, workload: Workload, lora: LoraSection) -> Counted:
    """Load the base, attach adapters, make the optimizer's moments, and run one step of `workload`."""
    cpu = torch.device("cpu")
    base = resolve(str(folder), "main", Sinks())
    loaded = load.load_base(base, QuantizationSection(), "auto", cpu, Sinks())
    model = adapters.attach(loaded, lora, 0, functions=lora_functions.choose(lora))
    causal_lm = model.get_base_model()
    parts = CausalParts.of(causal_lm)
    parts = replace(parts, loss_chunk=head_loss.chunk_of_run(causal_lm.config.vocab_size, torch.device("cpu")))
    set_gradient_checkpointing(causal_lm, workload.gradient_checkpointing, keep_random_state=False)
    optimizer = AdapterOptimizer(adapters.trainable(model), workload.optimizer, 0.0)
    batch = real_batch(workload, causal_lm.config.get_text_config().vocab_size)
    kind = "grpo" if workload.draws is not None else "dpo" if workload.compares else "sft"
    objective = objective_of(ObjectiveKeys(objective=kind, **({"num_iterations": 2} if kind == "grpo" else {})))  # type: ignore[arg-type]
    model.train()
    _give_gradients(optimizer)
    optimizer.step(0.0)

    def held() -> int:
        _give_gradients(optimizer)
        return sum(rounded(storage) for storage in _storages(model, optimizer, batch).values())

    def step() -> None:
        forward_backward(parts, batch, objective, 1.0, workload.neftune_alpha)

    before = held()
    by_profiler = before + _peak_above(step)
    mode = LiveBytes("cpu")
    mode.begin("held")
    held()
    for tensor in _tensors(model, optimizer, batch):
        mode.adopt(tensor, "weights")
    with mode:
        mode.begin("step")
        step()
    return Counted(by_profiler, mode.peaks["step"].total)


def real_batch(workload: Workload, vocabulary: int) -> Batch:
    """Rows of two documents, every token trained."""
    rows, length = workload.rows, workload.length
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    half = length // 2
    positions = torch.cat((torch.arange(half), torch.arange(length - half))).repeat(rows, 1)
    documents = (torch.arange(length) >= half).long().repeat(rows, 1)
    trained = torch.arange(rows * length)
    batch = Batch(ids, positions, documents, torch.roll(ids, -1, 1), torch.ones(rows, length), trained)
    if workload.draws is not None:
        return replace(batch, signs_R=torch.ones(rows), drawn_KT=torch.zeros(4, rows * length))
    if not workload.compares:
        return batch
    answers = (documents + 2 * torch.arange(rows)[:, None]).flatten()
    signs = torch.tensor([1.0, -1.0] * rows)
    return replace(batch, answer_T=answers, signs_R=signs, reference_R=torch.zeros(2 * rows))


def _give_gradients(optimizer: AdapterOptimizer) -> None:
    for key, master in optimizer.masters.items():
        optimizer.add_gradient(key, torch.zeros(()).expand(master.shape))


def _peak_above(work: Callable[[], None]) -> int:
    """The most that is live above the start while `work` runs, by the events of torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events: list[tuple[int, int, int]] = []
    waiting = list(results.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes: dict[int, int] = {}
    now = highest = 0
    for _, pointer, size in sorted(events):
        if size > 0:
            sizes[pointer] = rounded(size)
            now += sizes[pointer]
            highest = max(highest, now)
        else:
            now -= sizes.pop(pointer, rounded(-size))
    assert events, "the profiler saw no allocation"
    return highest


def _tensors(model: Any, optimizer: AdapterOptimizer, batch: Batch) -> list[torch.Tensor]:
    found = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            values = (getattr(one, name, None) for name in ("absmax", "code", "offset"))
            found += [value for value in values if isinstance(value, torch.Tensor)]
    found += [*optimizer.masters.values(), *optimizer.gradients.values(), optimizer.moments.buffer]
    return found + [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


def _storages(model: Any, optimizer: AdapterOptimizer, batch: Batch) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in _tensors(model, optimizer, batch))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
