"""Runs our own training step on meta tensors and counts what is live.

The model is built without weights, gets its 4-bit layers, adapters, checkpointing and optimizer from the code that
trains, and goes through every phase of a run. Layers repeat, so that two short models are run (three layers and one
period more) and each stretch of the run is extended by itself: a stretch's bytes grow by the same amount with each
layer, while which of the stretches is the highest may change.
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.batch import Batch
from qlora.memory.baselines import BASELINES, Baseline
from qlora.memory.trace import CATEGORIES, LiveBytes, Peak
from qlora.model import adapters
from qlora.model.attention import OnMeta
from qlora.model.generate import ANSWERS_AT_ONCE, name_of_cache
from qlora.model.load import load_nothing
from qlora.model.meta_model import build_unmatched, check_layers, choose_attention
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts
from qlora.step.optimizer import AdapterOptimizer

META = torch.device("meta")
PAGED_FROM_VALUES = 100_000  # bitsandbytes/optim/optimizer.py, get_state_buffer: smaller state is never paged
# From three layers on every stretch grows by the same bytes a layer (tests/memory/test_simulate.py); with two, there is
# none between the first and the last layer of the backward pass.
FEWEST_LAYERS = 3
OUTSIDE = ("start", "end")  # what the simulation itself does before and after
TRAIN_STRETCHES = ("forward", "loss", "backward", "backward end", "update")


@dataclass(frozen=True)
class ModelSpec:
    """What the model is made of: the same for every workload."""

    text: Any  # transformers' configuration of the causal model
    name: str
    lora: LoraSection
    quantization: QuantizationSection
    attention: str = "auto"
    target: str = "cuda"  # the device that the meta tensors stand for
    stack: Baseline = BASELINES["qlora"]

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        return int(self.text.vocab_size)


@dataclass(frozen=True)
class Workload:
    """What a step does: `rows` of `length` tokens. `packed`: rows hold several documents, or padding.

    `accumulates`: a step has several micro-batches, so that gradients live while one runs. `samples` prompts of
    `prompt_tokens` are answered with `new_tokens` between steps; 0 is none.
    """

    rows: int
    length: int
    gradient_checkpointing: bool = True
    optimizer: str = "paged_adamw_8bit"
    packed: bool = True
    accumulates: bool = True
    neftune_alpha: float = 0.0
    evaluates: bool = True
    samples: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Simulation:
    """Bytes of every stretch at its peak, and of what is held from the first step to the last.

    `paged` of the optimizer's bytes are managed by the driver, which moves them to the host when it must; the
    allocator's counters don't show them.
    """

    stretches: Mapping[str, Peak]
    held: Mapping[str, int]
    paged: int

    @property
    def worst(self) -> tuple[str, Peak]:
        """The stretch with the highest total."""
        name = max(self.stretches, key=lambda key: self.stretches[key].total)
        return name, self.stretches[name]

    def peak_of(self, names: Sequence[str]) -> Peak:
        return max((self.stretches[name] for name in names if name in self.stretches), key=lambda peak: peak.total)


class Simulator:
    """A frame, built in two sizes; `run` may be called for any number of workloads."""

    def __init__(self, frame: ModelSpec, whole: bool = False) -> None:
        self.frame = frame
        period = _period(frame.text)
        first = -(-FEWEST_LAYERS // period) * period
        sizes = [first, first + period]
        self.sizes = sizes if not whole and frame.layers > sizes[-1] else [frame.layers]
        with _collecting():
            self._rigs = [_MetaModel(frame, size) for size in self.sizes]

    def run(self, workload: Workload) -> Simulation:
        """Every phase of a run. The same workload gives the same bytes, whatever was asked before."""
        runs = []
        for rig in self._rigs:
            with _collecting():
                runs.append(rig.run(workload))
        return runs[0] if len(runs) == 1 else _extended(runs[0], runs[1], self.sizes, self.frame.layers)

    @property
    def linear_values(self) -> int:
        """Values of all layers that "all-linear" means, in the whole model."""
        return round(self._extend([rig.linear_values for rig in self._rigs]))

    @property
    def other_values(self) -> int:
        """Values of embeddings, head and norms."""
        return round(self._extend([rig.other_values for rig in self._rigs]))

    @property
    def adapter_values(self) -> int:
        return round(self._extend([rig.adapter_values for rig in self._rigs]))

    @property
    def largest_linear_values(self) -> int:
        return max(rig.largest_linear_values for rig in self._rigs)

    def _extend(self, values: Sequence[int]) -> float:
        if len(values) == 1:
            return values[0]
        return _line(values[0], values[1], self.sizes, self.frame.layers)


@contextmanager
def _collecting() -> Iterator[None]:
    """Storages that only a cycle of objects holds die at the end of the block, and not whenever Python next looks.

    What existed before is left out of the search, which would take half a second with torch imported.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


class _MetaModel:
    """The model with `layers` layers on meta, under its own counter."""

    def __init__(self, frame: ModelSpec, layers: int) -> None:
        self.frame = frame
        self.live = LiveBytes(frame.target)
        self.live.labels.vocabulary = frame.vocabulary
        text = _with_layers(frame.text, layers)
        chosen = choose_attention(text, frame.attention, frame.name, frame.target)
        model = build_unmatched(text, chosen, frame.name)
        check_layers(model, frame.name)
        self.linear_values, self.other_values, self.largest_linear_values = _count_values(model)
        with self.live, OnMeta(frame.target):
            self.live.begin("load")
            with self.live.region("weights"):
                load_nothing(model, frame.quantization)
                frame.stack.settle(model)
                for tensor in (*model.parameters(), *model.buffers()):
                    self.live.adopt(tensor, "weights")
            with self.live.region("adapters"):
                # EVA's start takes rows; the adapters it gives are as large as any.
                lora = frame.lora.model_copy(update={"init": "default"})
                self.model = adapters.attach(model, lora, 0, dtype=frame.stack.adapter_dtype)
        self.parameters = adapters.trainable(self.model)
        self.adapter_values = sum(parameter.numel() for parameter in self.parameters.values())
        self.live.labels.gradient_shapes = {tuple(parameter.shape) for parameter in self.parameters.values()}
        self.causal_lm = self.model.get_base_model()
        self.parts = CausalParts.of(self.causal_lm)

    def run(self, workload: Workload) -> Simulation:
        live, frame = self.live, self.frame
        live.packed = workload.packed
        live.peaks = {"load": live.peaks["load"]}
        live.renew()
        live.begin("start")
        frame.stack.set_checkpointing(self.causal_lm, workload.gradient_checkpointing)
        with live, OnMeta(frame.target), frame.stack.computing(), self._marks():
            with live.region("optimizer"):
                optimizer = frame.stack.optimizer(self.parameters, workload.optimizer, 0.0)
                self._settle_optimizer(optimizer)
            gc.collect()
            held = live.live
            batch = _batch(workload)
            if workload.accumulates:
                self._give_gradients(optimizer)
            self.model.train()
            live.begin("forward")
            frame.stack.forward_backward(self.parts, batch, workload.neftune_alpha)
            live.begin("update")
            optimizer.clip(optimizer.gradient_norm(), 1.0)
            optimizer.step(1e-4)
            self.model.eval()
            with torch.no_grad():
                if workload.evaluates:
                    live.begin("evaluate")
                    frame.stack.evaluate(self.parts, batch)
                if workload.samples:
                    live.begin("generate")
                    self._answer(workload)
            live.begin("end")
            paged = _paged_bytes(optimizer, workload.optimizer, frame.target)
            optimizer.detach()
            del optimizer, batch
        return Simulation({name: peak for name, peak in live.peaks.items() if name not in OUTSIDE}, held, paged)

    def _settle_optimizer(self, optimizer: AdapterOptimizer) -> None:
        """Its moments exist from the first update on: make them before anything is counted."""
        if self.frame.target == "cuda" and isinstance(optimizer.inner, torch.optim.AdamW):
            for group in optimizer.inner.param_groups:
                group["foreach"] = True  # what torch chooses by itself on a GPU
        self._give_gradients(optimizer)
        optimizer.step(0.0)

    def _give_gradients(self, optimizer: AdapterOptimizer) -> None:
        with self.live.region("gradients"):
            for master in optimizer.masters.values():
                master.grad = torch.zeros_like(master)

    @contextmanager
    def _marks(self) -> Iterator[None]:
        """Where the stretches of a step begin: at the trunk's end, and when the gradients of a layer are complete."""
        begin = self.live.begin

        def trunk_done(*_: Any) -> None:
            if self.model.training:
                begin("loss")

        handles: list[Any] = [self.parts.trunk.register_forward_hook(trunk_done)]
        of_layer = _first_of_each_layer(self.parameters)
        if len(of_layer) > 1:
            top, second = max(of_layer), sorted(of_layer)[1]
            for layer, stretch in ((top, "backward"), (second, "backward end")):
                handles.append(
                    of_layer[layer].register_post_accumulate_grad_hook(partial(_begin, begin, stretch))  # type: ignore[no-untyped-call]
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _answer(self, workload: Workload) -> None:
        """Prompts read with a cache, and the last of the new tokens."""
        rows = min(workload.samples, ANSWERS_AT_ONCE)
        length = workload.prompt_tokens + workload.new_tokens
        ids_BS = torch.zeros(rows, length, dtype=torch.int64, device=META)
        one_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=META)
        mask_BS = torch.ones_like(ids_BS)
        output = self.model(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=ids_BS, use_cache=True, logits_to_keep=1
        )
        longer_BS = torch.cat((mask_BS, torch.ones_like(one_B1)), dim=1)
        name = name_of_cache(self.model)
        self.model(
            input_ids=one_B1,
            attention_mask=longer_BS,
            position_ids=one_B1,
            use_cache=True,
            logits_to_keep=1,
            **{name: output[name]},
        )


def _begin(begin: Any, stretch: str, _parameter: Tensor) -> None:
    begin(stretch)


def _batch(workload: Workload) -> Batch:
    """Rows of which every token is trained: nothing that real rows hold takes more."""
    shape = (workload.rows, workload.length)
    ids = [torch.empty(shape, dtype=torch.int64, device=META) for _ in range(4)]
    weights = torch.empty(shape, dtype=torch.float32, device=META)
    trained = torch.empty(workload.rows * workload.length, dtype=torch.int64, device=META)
    return Batch(ids[0], ids[1], ids[2], ids[3], weights, trained)


def _count_values(model: Any) -> tuple[int, int, int]:
    from qlora.model.meta_model import linear_layers

    linear = [layer.weight.numel() for _, layer in linear_layers(model)]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return sum(linear), everything - sum(linear), max(linear)


def _paged_bytes(optimizer: AdapterOptimizer, name: str, target: str) -> int:
    if target != "cuda" or not name.startswith("paged_"):
        return 0
    return sum(
        value.nbytes
        for state in optimizer.inner.state.values()
        for slot, value in state.items()
        if slot in ("state1", "state2") and value.numel() >= PAGED_FROM_VALUES
    )


def _first_of_each_layer(parameters: Mapping[str, nn.Parameter]) -> dict[int, nn.Parameter]:
    found: dict[int, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if match := re.search(r"\.(\d+)\.", name):
            found.setdefault(int(match[1]), parameter)
    return found


def _period(text: Any) -> int:
    """After how many layers the kinds of layers repeat: 1 for most, 2 for Gemma 2, 6 for Gemma 3."""
    kinds = list(getattr(text, "layer_types", None) or ())
    for period in range(1, len(kinds)):
        if all(kind == kinds[at % period] for at, kind in enumerate(kinds)):
            return period
    return 1


def _with_layers(text: Any, layers: int) -> Any:
    """The configuration with its first `layers` layers; lists with an entry a layer are cut as well."""
    shorter = copy.deepcopy(text)
    for key, value in list(vars(shorter).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(shorter, key, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


def _line(low: float, high: float, sizes: Sequence[int], at: int) -> float:
    return high + (high - low) / (sizes[1] - sizes[0]) * (at - sizes[1])


def _extended(short: Simulation, long: Simulation, sizes: Sequence[int], layers: int) -> Simulation:
    def parts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {key: max(0, round(_line(a[key], b[key], sizes, layers))) for key in CATEGORIES}

    stretches = {}
    for name, peak in long.stretches.items():
        other = short.stretches[name]
        # The allocator's own figures go up in steps, not in a line: what the longer model had is not made less.
        slack = max(peak.slack, round(_line(other.slack, peak.slack, sizes, layers)))
        reserved = max(peak.reserved, round(_line(other.reserved, peak.reserved, sizes, layers)))
        stretches[name] = Peak(parts(other.parts, peak.parts), slack, reserved)
    paged = round(_line(short.paged, long.paged, sizes, layers))
    return Simulation(stretches, parts(short.held, long.held), paged)
