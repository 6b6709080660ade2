"""Does this run fit, and what did it take? Planned after its rows are known and before a weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from qlora import device as device_now
from qlora import numerics, processes
from qlora.data import judged_splits
from qlora.data.layout import GPU_MULTIPLE
from qlora.data.loader import TrainOrder
from qlora.data.prepare import PreparedData
from qlora.errors import foreign_failures
from qlora.events import Notice, Sink
from qlora.memory import calibration, hardware, host, multi_gpu, overheads, recomputing
from qlora.memory.estimate import DataFacts, Estimator
from qlora.memory.measured import Measured
from qlora.memory.plan import Plan, Planner, choose
from qlora.model.base_folder import BaseFolder
from qlora.model.generate import ANSWERS_AT_ONCE
from qlora.model.meta_model import has_head, text_config
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import Recipe
from qlora.training import schedule
from qlora.training.checkpoint import RunState
from qlora.units import counted


@dataclass(frozen=True)
class MemorySettings:
    """The settings that decide about memory now, with the plan they come from (None where no estimate was possible)."""

    micro_batch_size: int
    gradient_checkpointing: bool | int
    answers_at_once: int = ANSWERS_AT_ONCE
    layers: int = 0  # of the model; 0: not known
    plan: Plan | None = None
    planner: Planner | None = None
    place: Place = field(default_factory=Place)  # of the base's weights
    offload_activations: bool = False
    may_offload: bool = False  # on a GPU, where the recipe leaves it open
    may_move: Place = field(default_factory=Place)  # of weights, to the host (`weight_moving`)
    cards: multi_gpu.CardPlans | None = None  # of a run of several processes

    @property
    def offloaded(self) -> bool | int:
        """Of how many layers the inputs wait on the host: of those that are recomputed, where any do."""
        return self.offload_activations and self.gradient_checkpointing

    def smaller(self) -> MemorySettings | None:
        """The next smaller settings of a step: more layers recomputed, their inputs and embeddings on the host, which
        change no number, half the micro-batch, and at last layers on the host, which take time; None at the end."""
        if (more := recomputing.more(self.gradient_checkpointing, self.layers)) is not None:
            return replace(self, gradient_checkpointing=more)
        if self.may_offload and not self.offload_activations:
            return replace(self, offload_activations=True)
        if self.may_move.host_embedding and not self.place.host_embedding:
            return replace(self, place=replace(self.place, host_embedding=True))
        last = self.may_move.streams and not self.place.comes_and_goes and self.gradient_checkpointing is True
        return self.fewer_rows() or (replace(self, place=replace(self.place, streams=True)) if last else None)

    def fewer_rows(self) -> MemorySettings | None:
        return replace(self, micro_batch_size=self.micro_batch_size // 2) if self.micro_batch_size > 1 else None

    def as_of(self, state: RunState) -> MemorySettings:
        """Go on with what fitted: the sizes of micro-batches are part of what makes a resumed run the same run."""
        rows, recompute = state.micro_batch_size, state.gradient_checkpointing
        if rows is None or recompute is None:
            return self
        recompute = True if self.place.comes_and_goes else recompute
        at_once = state.answers_at_once or self.answers_at_once
        return replace(self, micro_batch_size=rows, gradient_checkpointing=recompute, answers_at_once=at_once)

    def kept_in(self, state: RunState) -> RunState:
        """The state from which a resumed run goes on with these settings."""
        rows, recompute = self.micro_batch_size, self.gradient_checkpointing
        state = replace(state, numerics=numerics.of_run(), answers_at_once=self.answers_at_once)
        return replace(state, micro_batch_size=rows, gradient_checkpointing=recompute)

    @property
    def beside_weights(self) -> int | None:
        """Bytes of the limit that the weights leave; None where no estimate was possible."""
        estimate = self.plan and self.plan.estimate
        return estimate.limit_bytes - estimate.components["weights"] if estimate else None

    def fewer_answers(self) -> MemorySettings | None:
        return replace(self, answers_at_once=self.answers_at_once // 2) if self.answers_at_once > 1 else None


def data_facts(recipe: Recipe, data: PreparedData, prompt_tokens: int) -> DataFacts:
    """What the rows say about memory; `prompt_tokens` is the longest prompt that evaluation answers.

    A pack of some epoch may be as long as all rows together, or as a pack may be.
    """
    lengths = data.train.lengths
    longest = min(sum(lengths), recipe.data.max_length) if recipe.data.packing else max(lengths, default=1)
    longest = max([longest, *data.eval.lengths])
    padded = min(recipe.data.max_length, -(-longest // GPU_MULTIPLE) * GPU_MULTIPLE)
    order = TrainOrder(data.train, recipe.data, recipe.train.seed, 1)
    rows = schedule.auto_batch_size(len(order.epoch_packs(0)), recipe.train) * recipe.train.answers_per_row
    prompts = [length - trained for length, trained in zip(lengths, data.train.trained, strict=True)]
    return DataFacts(
        longest=padded,
        asked_tokens=max([prompt_tokens, *prompts]),
        batch_size=-(-rows // processes.of_run().size),
        prompt_tokens=prompt_tokens,
        has_eval=bool(data.eval.lengths),
        documents=max(map(len, order.epoch_packs(0)), default=1),
        typical=sorted(lengths)[len(lengths) // 2] if lengths else 0,
        trained=_most_trained(recipe, data, padded),
        rows_of_pack=max(judged_splits.most_rows(one, recipe.data) for one in (data.train, data.eval)),
    )


def _most_trained(recipe: Recipe, data: PreparedData, longest: int) -> int:
    """Of a row's tokens with a loss, the most that a row may have: a pack of any epoch, or a row alone.

    A pack of `longest` tokens has no more of them than the rows that have most for their length, the last one cut.
    """
    alone = max([*data.train.trained, *data.eval.trained], default=1)
    if not recipe.data.packing:
        return min(longest, alone)
    rows = sorted(zip(data.train.trained, data.train.lengths, strict=True), key=lambda row: -row[0] / max(row[1], 1))
    room, found = longest, 0.0
    for trained, length in rows:
        found += trained * min(1.0, room / max(length, 1))
        room -= min(room, length)
    return min(longest, max(alone, math.ceil(found)))


def plan_run(recipe: Recipe, base: BaseFolder, facts: DataFacts, sink: Sink) -> MemorySettings:
    """The settings of the run, with "auto" decided. Raises DoesNotFit, with remedies, when nothing fits the limit."""
    machine = hardware.this_machine(recipe.memory.limit)
    if recipe.memory.shard_weights is True and processes.of_run().size == 1:
        sink.emit(Notice("memory", "memory.shard_weights = true: one process holds all of the base"))
    if recipe.memory.limit == "auto":
        # What is left does not count what this process has taken already (its CUDA context too); the estimate does.
        expected = overheads.context_bytes(machine.gpu)[0]
        taken = (
            host.held_bytes()
            if machine.device_type == "cpu"
            else device_now.context_taken(device_now.current(), expected)
        )
        machine = replace(machine, limit_bytes=machine.limit_bytes + taken)
    text, _ = text_config(base.config, base.name, has_head(base))
    estimator = Estimator(text, base.name, machine)
    with foreign_failures() as failure:  # a model that does what meta tensors cannot: reads a value, calls a kernel
        if machine.device_type == "cpu":
            estimator.ask_process(recipe, facts)
        cards = multi_gpu.plans_of_run(estimator, recipe, facts)
        plan = cards.plans[0] if cards else choose(estimator, recipe, facts)
    if failure.error:
        reason = failure.reason[:120]
        sink.emit(Notice("memory", f"not checked: this architecture cannot be simulated without weights ({reason})"))
        rows, recompute = recipe.train.micro_batch_size, recipe.train.gradient_checkpointing
        moved, place = recipe.memory.offload_activations is True, Place.of(recipe.memory)
        recompute = True if recompute == "auto" else recompute
        return MemorySettings(1 if rows == "auto" else rows, recompute, offload_activations=moved, place=place)
    train, moved = plan.recipe.train, plan.recipe.memory.offload_activations is True
    assert train.micro_batch_size != "auto" and train.gradient_checkpointing != "auto"
    planner = Planner(estimator, facts)
    layers, recompute = int(text.num_hidden_layers), train.gradient_checkpointing
    if not isinstance(recompute, bool) and recompute > layers:
        message = f"train.gradient_checkpointing = {recompute}: the model has {counted(layers, 'layer')}; all of them"
        sink.emit(Notice("memory", f"{message} are recomputed", recompute - layers))
        recompute = True
    at_once = plan.estimate.answers_at_once
    settings = MemorySettings(train.micro_batch_size, recompute, at_once, plan=plan, planner=planner)
    free = machine.device_type == "cuda" and recipe.memory.offload_activations == "auto"
    place = Place.of(plan.recipe.memory)
    return replace(settings, layers=layers, offload_activations=moved, may_offload=free, place=place, cards=cards)


def compare(settings: MemorySettings, measured: Measured) -> dict[str, dict[str, int]] | None:
    """Predicted beside measured, part by part; on a GPU the pair is remembered for later estimates."""
    if settings.plan is None or settings.planner is None:
        return None
    estimate, machine = settings.plan.estimate, settings.planner.estimator.machine
    on_gpu = machine.device_type == "cuda"
    predicted_peak = estimate.tensor_bytes if on_gpu else estimate.peak_bytes
    pairs = {"peak": {"predicted": predicted_peak, "measured": measured.peak_bytes}}
    for part in ("weights", "adapters", "optimizer"):
        pairs[part] = {"predicted": estimate.components[part], "measured": getattr(measured, f"{part}_bytes")}
    planned, moved = settings.plan.recipe.train, settings.plan.recipe.memory.offload_activations is True
    now = (settings.micro_batch_size, settings.gradient_checkpointing, settings.offload_activations, settings.place)
    before = (planned.micro_batch_size, planned.gradient_checkpointing, moved, Place.of(settings.plan.recipe.memory))
    unchanged = repr(before) == repr(now)  # 1 is not all
    if on_gpu and machine.gpu is not None and unchanged:
        factor = settings.planner.estimator.correction.factor
        predicted = round(estimate.tensor_bytes / factor)
        calibration.add(calibration.Pair(machine.gpu.name, measured.torch_version, predicted, measured.peak_bytes))
    return pairs
