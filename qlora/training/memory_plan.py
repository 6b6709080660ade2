"""Does this run fit? Asked after its rows are known and before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora.data.loader import PAD_TO_MULTIPLE, TrainOrder
from qlora.data.prepare import PreparedData
from qlora.errors import foreign_failures
from qlora.events import Notice, Sink
from qlora.memory import calibration, hardware, overheads
from qlora.memory.estimate import DataFacts, Estimator
from qlora.memory.plan import Plan, Planner, choose
from qlora.model.meta_model import text_config
from qlora.recipe.reading import Recipe
from qlora.training import schedule
from qlora.training.evaluate import questions_of
from qlora.training.memory_use import Measured, current_rss_bytes
from qlora.training.recovery import MemorySettings

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer
    from qlora.model.base_folder import BaseFolder


def data_facts(recipe: Recipe, data: PreparedData, chat: ChatTokenizer) -> DataFacts:
    """What the rows say about memory. A pack of some epoch may be as long as all rows together, or as a pack may be."""
    lengths = data.train.lengths
    longest = min(sum(lengths), recipe.data.max_length) if recipe.data.packing else max(lengths, default=1)
    longest = max([longest, *data.eval.lengths])
    padded = min(recipe.data.max_length, -(-longest // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE)
    order = TrainOrder(data.train, recipe.data, recipe.train.seed, 1)
    asked = questions_of(data.eval, chat, max(recipe.eval.samples, recipe.eval.exact_match_rows))
    return DataFacts(
        longest=padded,
        batch_size=schedule.auto_batch_size(len(order.epoch_packs(0)), recipe.train),
        prompt_tokens=max((len(question.prompt_ids) for question in asked), default=0),
        has_eval=bool(data.eval.lengths),
        typical=sorted(lengths)[len(lengths) // 2] if lengths else 0,
    )


def plan_run(recipe: Recipe, base: BaseFolder, facts: DataFacts, sink: Sink) -> MemorySettings:
    """The settings of the run, with "auto" decided. Raises DoesNotFit, with remedies, when nothing fits the limit."""
    machine = hardware.this_machine(recipe.memory.limit)
    if recipe.memory.limit == "auto":
        # What is left does not count what this process has taken already (its CUDA context too); the estimate does.
        taken = current_rss_bytes() if machine.device_type == "cpu" else overheads.CUDA_CONTEXT_BYTES
        machine = replace(machine, limit_bytes=machine.limit_bytes + taken)
    text, _ = text_config(base.config, base.name)
    estimator = Estimator(text, base.name, machine)
    with foreign_failures() as failure:  # a model that does what meta tensors cannot: reads a value, calls a kernel
        plan = choose(estimator, recipe, facts)
    if failure.error:
        reason = failure.reason[:120]
        sink.emit(Notice("memory", f"not checked: this architecture cannot be simulated without weights ({reason})"))
        rows, recompute = recipe.train.micro_batch_size, recipe.train.gradient_checkpointing
        return MemorySettings(1 if rows == "auto" else rows, recompute in (True, "auto"))
    return fit_of(plan, Planner(estimator, facts))


def fit_of(plan: Plan, planner: Planner) -> MemorySettings:
    train = plan.recipe.train
    assert train.micro_batch_size != "auto" and train.gradient_checkpointing != "auto"
    return MemorySettings(train.micro_batch_size, train.gradient_checkpointing, plan=plan, planner=planner)


def as_event(plan: Plan) -> dict[str, Any]:
    """What a plan event says about memory: plain values."""
    estimate = plan.estimate.as_dict()
    keys = ("peak_bytes", "limit_bytes", "fits", "host_peak_bytes", "disk_bytes", "components", "settings", "notes")
    return {**{key: estimate[key] for key in keys}, "changes": dict(plan.changes)}


def compare(fit: MemorySettings, measured: Measured) -> dict[str, dict[str, int]] | None:
    """Predicted beside measured, part by part; on a GPU the pair is remembered for later estimates."""
    if fit.plan is None or fit.planner is None:
        return None
    estimate, machine = fit.plan.estimate, fit.planner.estimator.machine
    on_gpu = machine.device_type == "cuda"
    predicted_peak = estimate.tensor_bytes if on_gpu else estimate.peak_bytes
    pairs = {"peak": {"predicted": predicted_peak, "measured": measured.peak_bytes}}
    for part in ("weights", "adapters", "optimizer"):
        pairs[part] = {"predicted": estimate.components[part], "measured": getattr(measured, f"{part}_bytes")}
    unchanged = fit.plan.recipe.train.micro_batch_size == fit.micro_batch_size
    if on_gpu and machine.gpu is not None and unchanged:
        factor = fit.planner.estimator.correction.factor
        predicted = round(estimate.tensor_bytes / factor)
        calibration.add(calibration.Pair(machine.gpu.name, measured.torch_version, predicted, measured.peak_bytes))
    return pairs
