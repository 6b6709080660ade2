"""Runs our own training step on meta tensors and counts what is live.

The model is built without weights, gets its 4-bit layers, adapters, checkpointing and optimizer from the code that
trains, and goes through every phase of a run. Layers repeat, so that two short models are run (three layers and one
period more) and each phase of the run is extended by itself: a phase's bytes grow by the same amount with each
layer, while which of the phases is the highest may change.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from qlora.batch import Batch
from qlora.memory import tape
from qlora.memory.allocator import rounded
from qlora.memory.asking import Asks, ask
from qlora.memory.host_weights import MetaStore, of_head, of_model, of_tables
from qlora.memory.layer_kinds import drawn_layers, period_of
from qlora.memory.lines import Line, activations_of
from qlora.memory.operations import OperationCounter, of_whole_model
from qlora.memory.plain_optimizer import PlainOptimizer
from qlora.memory.recomputing import apart, put_together
from qlora.memory.repeated import RepeatedOperations
from qlora.memory.shelf import Shelf, Shelved
from qlora.memory.simulation import Drawn, ModelSpec, Simulation, ValueCounts, Workload
from qlora.memory.trace import HOST, LiveBytes, Sums
from qlora.model import adapters, experts, full_logits, lora_functions, precision
from qlora.model.attention import OnMeta, name_of
from qlora.model.config_filter import with_layers
from qlora.model.generate import ANSWERS_AT_ONCE, name_of_cache
from qlora.model.layer_blobs import stacks_of
from qlora.model.made_up import load_nothing, ready_to_load_nothing
from qlora.model.meta_model import build_unmatched, check_layers, choose_attention, linear_layers
from qlora.model.weight_receiving import tables
from qlora.model.weight_streaming import inside
from qlora.step import head_blocks, head_loss, loss, offload
from qlora.step.experts import IN_CHUNKS, IN_TRITON
from qlora.step.forward import CausalParts, batch_logprobs
from qlora.step.group_relative import Known
from qlora.step.kernels import trial
from qlora.step.layerwise import recomputable
from qlora.step.optimizer import AdapterOptimizer

META = torch.device("meta")
# Chunks of the head's loss that are run one by one (14 ms each); of more, the peak is drawn from larger chunks.
MOST_CHUNKS = 256
DRAWN_CHUNKS = (8, 16)
OUTSIDE = ("start", "end")  # what the simulation itself does before and after


class Simulator:
    """The model of a spec, built in two sizes; `run` may be called for any number of workloads.

    With a `shelf` nothing is built for what was simulated before, by this process or by another.
    """

    def __init__(self, spec: ModelSpec, whole: bool = False, shelf: Shelf | None = None) -> None:
        self.spec, self.shelf = spec, shelf
        self._period = period_of(spec.text)
        sizes = list(drawn_layers(spec.text))
        self.sizes = sizes if not whole and spec.layers > sizes[-1] else [spec.layers]
        self._known: dict[Workload, Simulation] = {}  # plans, searches and pictures ask the same again

    @cached_property
    def _models(self) -> list[_MetaModel]:
        """Whatever was imported and asked before: modules of libraries, and what these make once, are no model's."""
        ready_to_load_nothing()
        repeated = RepeatedOperations()
        with _collecting(building=True):
            return [_MetaModel(self.spec, size, repeated) for size in self.sizes]

    @cached_property
    def drawn(self) -> Drawn:
        values = ValueCounts(*map(self._whole, self._models[0].values, self._models[-1].values))
        cast = self._whole(*(sum(model.replaced) for model in (self._models[0], self._models[-1])))
        on_host = self._whole(*(model.host_bytes for model in (self._models[0], self._models[-1])))
        tables = self._models[0].tables
        stacked = self._whole(*(model.stacked_bytes for model in (self._models[0], self._models[-1])))
        return Drawn(values, cast, on_host, *tables, stacked)

    def run(self, workload: Workload) -> Simulation:
        """Every phase of a run. The same workload gives the same bytes, whatever was asked before."""
        if workload not in self._known:
            self._known[workload] = self._found(workload)
        return self._known[workload]

    def _found(self, workload: Workload) -> Simulation:
        """From the shelf, else simulated and put there."""
        if workload.recomputed and len(self.sizes) > 1:
            none, whole = apart(workload)
            return put_together(self.run(none), self.run(whole), self.spec.layers, workload.recomputed)
        if self.shelf is None:
            return self._simulated(workload)
        key = self.shelf.key(self.spec, workload, self.sizes)
        if (found := self.shelf.get(key)) is not None:
            self.__dict__.setdefault("drawn", found.drawn)
            return found.simulation
        simulation = self._simulated(workload)
        self.shelf.put(key, Shelved(self.drawn, simulation))
        return simulation

    def _simulated(self, workload: Workload) -> Simulation:
        tokens, chunk = workload.rows * workload.length, self._models[0].parts.chunk_tokens
        if tokens <= MOST_CHUNKS * chunk or self._models[0].parts.head_block:
            return self._run(workload, chunk)
        large, small = (-(-tokens // count) for count in DRAWN_CHUNKS)
        line = Line(large, small, chunk)  # a chunk's tensors grow with its tokens, and nothing else does
        return line.simulation(self._run(workload, large), self._run(workload, small))

    def _run(self, workload: Workload, chunk: int) -> Simulation:
        runs = []
        for model in self._models:
            with _collecting():
                runs.append(model.run(workload, chunk))
        short, long = (played for _, played in (runs[0], runs[-1]))
        line = Line(self.sizes[0], self.sizes[-1], self.spec.layers)
        each = tuple((Counter(long.start) - Counter(short.start)).elements())
        long.flat = [line.at(one, other) for one, other in zip(short.flat, long.flat, strict=True)]
        reserved = tape.play(long, self.sizes[-1], self._period, self.spec.layers, each)
        simulation = line.simulation(runs[0][0], runs[-1][0])
        work = of_whole_model([run.work for run, _ in runs], self.sizes, self.spec.layers)
        return replace(simulation, reserved=reserved, each=line.each(runs[0][0], runs[-1][0]), work=work)

    def _whole(self, short: int, long: int) -> int:
        """What the whole model has, by what its two sizes have: each layer adds the same."""
        return Line(self.sizes[0], self.sizes[-1], self.spec.layers).at(short, long)


@contextmanager
def _collecting(building: bool = False) -> Iterator[None]:
    """Storages that only a cycle of objects holds die at the end of the block, and not whenever Python next looks.

    What existed before is left out of the search, which would take half a second with torch imported. A program that
    has frozen its objects itself keeps them so. While a model is built (peft's first adapters) Python does not look by
    itself: when it does depends on what the process did before.
    """
    ours, looks = gc.get_freeze_count() == 0, building and gc.isenabled()
    if ours:
        gc.freeze()
    if looks:
        gc.disable()
    try:
        yield
        gc.collect()
    finally:
        if looks:
            gc.enable()
        if ours:
            gc.unfreeze()


class _MetaModel:
    """The model with `layers` layers on meta, under its own counter."""

    def __init__(self, spec: ModelSpec, layers: int, repeated: RepeatedOperations) -> None:
        self.spec = spec
        self.live = LiveBytes(spec.target)
        self.live.repeated = repeated
        self.live.vocabulary = int(spec.text.vocab_size)
        text = with_layers(spec.text, layers)
        model = build_unmatched(text, choose_attention(text, spec.attention, spec.name, spec.target), spec.name)
        check_layers(model, spec.name)
        if spec.kernel is not None:
            model.config._attn_implementation = name_of(spec.kernel)
        linear = [layer.weight.numel() for _, layer in linear_layers(model)]
        everything = sum(parameter.numel() for parameter in model.parameters())
        with self.live, OnMeta(spec.target):
            self.live.begin("load")
            with self.live.region("weights"):
                load_nothing(model, spec.quantization, spec.place, MetaStore(self.live, spec.place.shards))
                if (streamed := inside(model)) is not None:
                    streamed.ring.prepare()
                self.host_bytes, self.tables = of_model(model), (of_tables(model), of_head(model))
                self.stacked_bytes = sum(stack.nbytes for _, stack in stacks_of(model))
                self.replaced = spec.baseline.settle(model, spec.quantization.type != "none")
                precision.settle(model, spec.dtype)
                experts.compute_by(model, _experts_of(spec))
                on_host = set(map(id, tables(model) if spec.target == "cuda" else ()))
                for tensor in (*model.parameters(), *model.buffers()):
                    self.live.adopt(tensor, HOST if id(tensor) in on_host else "weights")
            with self.live.region("adapters"):
                # EVA's start takes rows; the adapters it gives are as large as any.
                lora = spec.lora.model_copy(update={"init": "default"})
                functions = spec.functions or _functions_of(spec)
                self.model = adapters.attach(model, lora, 0, spec.adapter_dtype, functions=functions)
        self.parameters = adapters.trainable(self.model)
        adapter = sum(parameter.numel() for parameter in self.parameters.values())
        self.values = ValueCounts(sum(linear), max(linear), everything - sum(linear), adapter)
        self.live.gradient_shapes = {tuple(parameter.shape) for parameter in self.parameters.values()}
        self.causal_lm = self.model.get_base_model()
        parts = CausalParts.of(self.causal_lm, on_card=spec.target == "cuda")
        block = spec.head_block if head_blocks.sender_of(parts.head) is None else parts.head_block
        self.parts = replace(parts, head_block=block, loss_chunk=0 if block else _loss_chunk_of(spec))

    def run(self, workload: Workload, chunk: int) -> tuple[Simulation, tape.Tape]:
        """A run whose loss takes `chunk` tokens at a time, and the tape of its step."""
        live, spec, parts = self.live, self.spec, replace(self.parts, chunk_tokens=chunk)
        live.packed, live.sums = workload.packed, Sums(workload.rows, workload.multiprocessors)
        live.peaks = {"load": live.peaks["load"]}
        live.renew()
        live.begin("start")
        pool = offload.Pool(META, self._block)
        layers = len(recomputable(self.causal_lm))
        inputs = offload.held_by(pool, workload.offloads and workload.recompute, layers)
        spec.baseline.set_checkpointing(self.causal_lm, workload.recompute, inputs)
        with live, OnMeta(spec.target), spec.baseline.computing(), self._marks():
            with live.region("optimizer"):
                optimizer = self._optimizer(workload.optimizer)
                self._give_gradients(optimizer)
                optimizer.step(0.0)  # other stacks' moments exist from the first update on: before anything is counted
            gc.collect()
            kept = live.live
            batch = _batch(workload)
            if workload.accumulates:
                self._give_gradients(optimizer)
            self.model.train()
            live.begin("forward")
            recorded = live.record(self.replaced)
            live.counter = OperationCounter(workload.document_lengths) if spec.target == "cuda" else None
            recorded.set_apart([rounded(nbytes) for nbytes in optimizer.buffer_sizes])
            recorded.mark("forward")
            spec.baseline.forward_backward(parts, batch, workload.neftune_alpha)
            live.begin("update")
            recorded.mark("update")
            optimizer.clip(optimizer.gradient_norm(), 1.0)
            optimizer.step(1e-4)
            work = None if live.counter is None else live.counter.work()
            live.tape = live.counter = None
            self.model.eval()
            with torch.no_grad():
                live.begin("selfcheck")
                self._check_itself(batch)
                if workload.evaluates:
                    live.begin("evaluate")
                    spec.baseline.evaluate(parts, batch)
                if workload.samples:
                    live.begin("generate")
                    self._answer(workload)
                if workload.draws is not None:
                    live.packed = True  # prompts are padded, which masks show
                    live.begin("draw")
                    ask(self.model, workload.draws)
            live.begin("end")
            paged = self._paged_bytes(optimizer, workload.optimizer)
            optimizer.detach()
            del optimizer, batch
            self._ask(workload.asks)
        phases = {name: peak for name, peak in live.peaks.items() if name not in OUTSIDE}
        no_more, reserved = dict.fromkeys(phases, 0), tape.play(recorded, 0, 1, 0)
        pinned = pool.nbytes if spec.target == "cuda" else 0  # elsewhere it is all one memory
        more = (self._keeps_less(), self._held, pinned, work)
        return Simulation(phases, kept, paged, reserved, no_more, *more), recorded

    def _block(self) -> torch.Tensor:
        """Of the host's memory, which is no memory of a GPU's."""
        with self.live.region(HOST) if self.spec.target == "cuda" else nullcontext():
            return torch.empty(offload.BLOCK_BYTES, dtype=torch.uint8, device=META)

    def _optimizer(self, name: str) -> AdapterOptimizer | PlainOptimizer:
        if self.spec.baseline.masters:
            return AdapterOptimizer(self.parameters, name, 0.0)
        return PlainOptimizer(self.parameters, name, self.spec.target == "cuda")

    def _paged_bytes(self, optimizer: AdapterOptimizer | PlainOptimizer, name: str) -> int:
        if isinstance(optimizer, PlainOptimizer):
            return optimizer.paged_bytes
        return optimizer.moments.buffer.nbytes if self.spec.target == "cuda" and name.startswith("paged_") else 0

    def _give_gradients(self, optimizer: AdapterOptimizer | PlainOptimizer) -> None:
        with self.live.region("gradients"):
            for key, parameter in self.parameters.items():
                zero = torch.zeros((), dtype=parameter.dtype, device=META)
                optimizer.add_gradient(key, zero.expand(parameter.shape))

    def _keeps_less(self) -> int:
        """Nothing goes back to the embedding, so that the first layer keeps less for the backward pass than another."""
        starts = self._starts
        return max(0, starts[2] + starts[0] - 2 * starts[1]) if len(starts) > 2 else 0

    @contextmanager
    def _marks(self) -> Iterator[None]:
        """Where the phases of a step begin: at the trunk's end, and when the gradients of a layer are complete."""
        live = self.live
        of_layer = _first_of_each_layer(self.parameters)
        phase_at = {max(of_layer): "backward", sorted(of_layer)[1]: "backward end"} if len(of_layer) > 1 else {}

        def into_layer(layer: int, *_: Any) -> None:
            if live.tape is not None and live.phase == "forward":  # not when it is computed once more
                live.tape.mark(tape.FORWARD, layer)

        def starts(*_: Any) -> None:
            if live.phase == "forward":
                self._starts.append(activations_of(live.live))

        def trunk_done(*_: Any) -> None:
            if live.tape is not None:
                live.tape.mark("loss")
                live.begin("loss")
                self._held = activations_of(live.live)

        def gradients_of(layer: int, *_: Any) -> None:
            if live.tape is not None:
                live.tape.mark(tape.BACKWARD, layer)
            if layer in phase_at:
                live.begin(phase_at[layer])

        with ExitStack() as hooks:
            hooks.enter_context(self.parts.trunk.register_forward_hook(trunk_done))
            self._starts: list[int] = []
            self._held = 0
            for module in recomputable(self.causal_lm)[:3]:
                hooks.enter_context(module.register_forward_pre_hook(starts))
            for layer, (name, parameter) in of_layer.items():
                module = self.model.get_submodule(name[: re.search(r"\.\d+\.", name).end() - 1])  # type: ignore[union-attr]
                hooks.enter_context(module.register_forward_pre_hook(partial(into_layer, layer)))
                done = parameter.register_post_accumulate_grad_hook(partial(gradients_of, layer))  # type: ignore[no-untyped-call]
                hooks.enter_context(done)
            yield

    def _check_itself(self, batch: Batch) -> None:
        """What a run does before its first step, in the order that `training/selfcheck.py` does it."""
        tokens = min(full_logits.TOKENS, batch.input_ids_BS.shape[1])
        kept = [full_logits.logprobs(self.causal_lm, batch.input_ids_BS[0, :tokens]) for _ in range(2)]
        kept.append(batch_logprobs(self.parts, _batch(Workload(1, 2 * tokens))))

    def _ask(self, asks: Asks) -> None:
        """A study before there is an optimizer, with the adapters off; an exam after it."""
        self.live.packed = True  # prompts are padded, which masks show
        for phase, batches in asks:
            gc.collect()
            self.live.begin(phase)
            with torch.no_grad(), self.model.disable_adapter():
                for asked in batches:
                    ask(self.model, asked)
        self.live.begin("end")

    def _answer(self, workload: Workload) -> None:
        """Prompts read with a cache, and the last of the new tokens."""
        rows = min(workload.samples, ANSWERS_AT_ONCE)
        length = workload.prompt_tokens + workload.new_tokens
        ids_BS = torch.zeros(rows, length, dtype=torch.int64, device=META)
        one_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=META)
        mask_BS = torch.ones_like(ids_BS)
        read = partial(self.model, use_cache=True, logits_to_keep=1)
        output = read(input_ids=ids_BS, attention_mask=mask_BS, position_ids=ids_BS)
        longer_BS = torch.cat((mask_BS, torch.ones_like(one_B1)), dim=1)
        name = name_of_cache(self.model)
        read(input_ids=one_B1, attention_mask=longer_BS, position_ids=one_B1, **{name: output[name]})


def _functions_of(spec: ModelSpec) -> str:
    """Who computes linear layers: peft in other stacks, and who does in a new run of ours."""
    if spec.baseline.name != "qlora":
        return lora_functions.PEFT
    return lora_functions.choose(spec.lora, None, spec.target == "cuda" and trial.expected())


def _experts_of(spec: ModelSpec) -> str:
    """As `_functions_of`; who computes in fp16 may have a card from before Ampere, which has no kernel for it."""
    if spec.experts is not None or spec.baseline.name != "qlora":
        return spec.experts or IN_CHUNKS
    may = spec.target == "cuda" and spec.dtype == torch.bfloat16 and trial.expected()
    return IN_TRITON if may else IN_CHUNKS


def _loss_chunk_of(spec: ModelSpec) -> int:
    """As `_functions_of`."""
    if spec.loss_chunk is not None or spec.baseline.name != "qlora":
        return spec.loss_chunk or 0
    if spec.target != "cuda":
        return loss.chunk_tokens(spec.text.vocab_size)
    return head_loss.chunk_tokens(spec.text.vocab_size) if trial.expected() else 0


def _batch(workload: Workload) -> Batch:
    """Rows with as many trained tokens as rows may have: nothing that real ones hold takes more."""
    shape = (workload.rows, workload.length)
    ids = [torch.empty(shape, dtype=torch.int64, device=META) for _ in range(4)]
    weights = torch.empty(shape, dtype=torch.float32, device=META)
    trained = torch.empty(workload.rows * (workload.trained or workload.length), dtype=torch.int64, device=META)
    lengths = workload.document_lengths
    starts = torch.empty(len(lengths) + 1, dtype=torch.int32, device=META)
    batch = Batch(ids[0], ids[1], ids[2], ids[3], weights, trained, starts, lengths, not workload.packed)
    if workload.draws is not None:
        signs = torch.empty(workload.rows, dtype=torch.float32, device=META)
        known_KT = torch.empty(len(Known._fields), len(trained), dtype=torch.float32, device=META)
        return replace(batch, signs_R=signs, drawn_KT=known_KT)
    if not workload.compares:
        return batch
    signs, reference = (torch.empty(-(-len(lengths) // 2) * 2, dtype=torch.float32, device=META) for _ in range(2))
    return replace(batch, answer_T=torch.empty_like(trained), signs_R=signs, reference_R=reference)


def _first_of_each_layer(parameters: Mapping[str, nn.Parameter]) -> dict[int, tuple[str, nn.Parameter]]:
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if match := re.search(r"\.(\d+)\.", name):
            found.setdefault(int(match[1]), (name, parameter))
    return found
