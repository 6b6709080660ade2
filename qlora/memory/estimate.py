"""The predicted peak of a run on a machine, part by part: what the simulation counts and what stands beyond tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora.errors import DoesNotFit
from qlora.memory import at_once, calibration, host, levers, margins, overheads, throughput
from qlora.memory.asking import PlainAsks, as_asked, most_rows
from qlora.memory.baselines import BASELINES, Baseline
from qlora.memory.hardware import Machine
from qlora.memory.host_weights import from_disk
from qlora.memory.levers import Saving
from qlora.memory.recomputing import of_model
from qlora.memory.shelf import Shelf
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import TRAIN_PHASES, Simulation, ValueCounts, Workload
from qlora.memory.spec import spec_of
from qlora.memory.throughput import Speed
from qlora.memory.trace import most_multiprocessors
from qlora.model.family_facts import facts_of
from qlora.model.generate import ANSWERS_AT_ONCE, SAMPLE_TOKENS
from qlora.model.weight_receiving import Place
from qlora.model.weight_stores import STAGING_BLOBS
from qlora.recipe.reading import Recipe
from qlora.report.drawn import Drawn

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_TOKENS = 1 << 26  # of a forward pass: with 64 layers of 1,024 values, their inputs alone are 8 TiB
HOST_SHARE = 0.9  # of the RAM that is free, what may be pinned or filled with what waits for the GPU
TYPICAL_BATCH = 16  # rows of a step that no recipe and no data set (`schedule.auto_batch_size` takes no more)
PROMPT_SHARE = 0.5  # of a row, which a prompt is taken to fill where no rows are known


@dataclass(frozen=True)
class DataFacts:
    """What is known of the rows: the longest row of a micro-batch, rows of a step, the longest prompt to be answered.

    `rows_of_pack`: of tensors, that a pack may become where the sides of a pair do not share one.

    `answer_tokens` is the longest answer of exact match, 0 without one. `asks` are the batches of a study.
    `asked_tokens` is the longest prompt to which GRPO draws answers.
    No row of a micro-batch has more than `trained` tokens with a loss (0: all may have), nor, in the first epoch, more
    than `documents`. Half of the documents are no longer than `typical`: no plan asks for shorter rows than that.
    """

    longest: int
    batch_size: int | None
    prompt_tokens: int
    has_eval: bool
    typical: int = 0
    documents: int = 0
    trained: int = 0
    answer_tokens: int = 0
    rows_of_pack: int = 1
    asks: PlainAsks = ()
    asked_tokens: int = 0


@dataclass(frozen=True)
class Estimate(Drawn):
    """Bytes. `components` add up to `peak_bytes`; `terms` are the parts of it that no tensor shows, by name.

    `peak_bytes` is the best guess, `error_bytes` the margin that past errors earned: a run fits where both together do.

    `phases` are the peaks of load, train, self-check, evaluate, generate, resume and merge. `tokens_per_second` is what
    is predicted of the step (`throughput.py`): it ranks plans and promises nothing; `ideal_tokens_per_second` is what
    the arithmetic allows at best. Both are 0 without a card.
    """

    peak_bytes: int
    error_bytes: int
    limit_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    components: Mapping[str, int]
    phases: Mapping[str, int]
    terms: Mapping[str, int]
    tensor_bytes: int  # what the allocator's counter will show at its peak, paged state not included
    paged_bytes: int
    tokens_per_second: float
    settings: Mapping[str, Any]
    calibrated_by: int = 0
    notes: tuple[str, ...] = ()
    limit_source: str = ""  # what the limit is, and where it comes from
    ideal_tokens_per_second: float = 0.0
    speed: Speed | None = None  # where the predicted time goes
    savings: Mapping[str, Saving] = field(default_factory=dict)  # what levers are likely to save, by key
    waiting_bytes: int = 0  # of the host's memory: weights, and inputs of layers
    host_limit_bytes: int | None = None  # what it has for them; None: not known
    answers_at_once: int = ANSWERS_AT_ONCE  # that are drawn, or asked for

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.limit_bytes and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether what waits there leaves a reserve of the host's memory."""
        return self.host_limit_bytes is None or self.waiting_bytes <= HOST_SHARE * self.host_limit_bytes

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.error_bytes

    def as_dict(self) -> dict[str, Any]:
        """The answer of `qlora-estimate --json`."""
        return {
            "peak_bytes": self.peak_bytes,
            "error_bytes": self.error_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "host_peak_bytes": self.host_peak_bytes,
            "waiting_bytes": self.waiting_bytes,
            "disk_bytes": self.disk_bytes,
            "components": dict(self.components),
            "settings": dict(self.settings),
            "phases": dict(self.phases),
            "terms": dict(self.terms),
            "tensor_bytes": self.tensor_bytes,
            "paged_bytes": self.paged_bytes,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "tokens_per_second_ideal": round(self.ideal_tokens_per_second, 1),
            "speed": throughput.as_dict(self.speed) if self.speed is not None else None,
            "calibrated_by_runs": self.calibrated_by,
            "notes": list(self.notes),
        }

    def drawing(self) -> RenderableType:
        from qlora.report.memory import estimate_view

        return estimate_view({**self.as_dict(), "limit_source": self.limit_source})


class Estimator:
    """Estimates of one base on one machine; models on meta are built once for each adapter and quantization."""

    def __init__(self, text: Any, name: str, machine: Machine, baseline: Baseline = BASELINES["qlora"]) -> None:
        self.text = text
        self.name = name
        self.machine = machine
        self.baseline = baseline
        gpu = machine.gpu
        self.correction = calibration.correction(gpu.name) if gpu is not None else calibration.Correction()
        self.held = host.held_bytes()
        # Of a run without a GPU the process is asked what it holds once a step was drawn: so one is drawn.
        self._shelf = Shelf() if machine.device_type == "cuda" else None
        self._simulators: dict[Any, Simulator] = {}
        self.asks: PlainAsks = ()  # of a study, where no rows are known
        # That are recomputed one by one; other stacks recompute all or none.
        self.layers = int(text.num_hidden_layers) if baseline.name == "qlora" else 1

    def estimate(self, recipe: Recipe, facts: DataFacts | None = None) -> Estimate:
        """The peak with the recipe's settings; "auto" of micro-batch and checkpointing stand for 1 and true."""
        return self._complete(recipe, facts, self.simulator(recipe))

    def values(self, recipe: Recipe) -> ValueCounts:
        """Parameters of the model that the recipe trains."""
        return self.simulator(recipe).drawn.values

    def simulator(self, recipe: Recipe) -> Simulator:
        place = Place.of(recipe.memory) if self.baseline == BASELINES["qlora"] else Place()
        key = (recipe.lora, recipe.quantization, recipe.model.attention, place, recipe.model.dtype)
        if key not in self._simulators:
            spec = spec_of(self.text, self.name, self.machine, self.baseline, recipe)
            whole = _by_whole_model(self.text, self.name)
            self._simulators[key] = Simulator(spec, whole, self._shelf)
        return self._simulators[key]

    def ask_process(self, recipe: Recipe, facts: DataFacts | None) -> None:
        """Ask once a step was drawn what the process holds: a run needs the model's code as well."""
        self.estimate(recipe, facts)
        self.held = host.held_bytes()

    def _complete(self, recipe: Recipe, facts: DataFacts | None, simulator: Simulator) -> Estimate:
        machine, factor = self.machine, self.correction.factor
        workload = self._workload(recipe, facts, simulator)
        simulation = simulator.run(workload)
        terms = self._terms(recipe.train.deterministic, rows_are_read=facts is not None)
        worst = simulation.worst
        slack = worst.slack if machine.device_type == "cuda" else 0
        fragmentation = slack + self._beside_tensors(simulation, workload)
        components = {key: round(value * factor) for key, value in worst.parts.items()}
        components["workspace"] += terms.get("cublas_workspace", 0) + fragmentation
        components["context"] = terms["context"]
        fixed = sum(terms.values()) + fragmentation
        phases = {
            "load": simulation.phases["load"].total,
            "train": simulation.peak_of(TRAIN_PHASES).total,
            "selfcheck": simulation.phases["selfcheck"].total,
            "evaluate": simulation.peak_of(("evaluate", "update")).total,
            "generate": simulation.peak_of(("generate", "draw", "update")).total,
            "resume": sum(simulation.kept.values()),
            **{phase: simulation.phases[phase].total for phase, _ in workload.asks},
        }
        phases = {name: round(total * factor) + fixed for name, total in phases.items()}
        if machine.device_type != "cuda":  # kernels, pools and threads come with the first steps
            phases["load"] -= fragmentation
        largest, rank = simulator.drawn.values.largest_linear, recipe.lora.r
        phases["merge"] = overheads.merge_bytes(largest, rank) + sum(terms.values())
        adapter, optimizer = simulation.kept["adapters"], simulation.kept["optimizer"]
        values = simulator.drawn.values.linear + simulator.drawn.values.other
        merged = 2 * values * len(recipe.export.formats)
        of_base = (recipe.memory, recipe.quantization.type, simulation.kept["weights"], values)
        peak, speed = sum(components.values()), self._speed(recipe, facts, workload, simulator)
        on_disk = self._on_disk(recipe, simulator)[1]
        staged = STAGING_BLOBS * on_disk // int(self.text.num_hidden_layers)
        waiting = simulation.pinned + simulator.drawn.host_bytes - on_disk + staged
        of_host = overheads.CUDA_HOST_BYTES + simulation.paged + waiting
        of_host += overheads.snapshot_bytes(adapter, optimizer, True)
        return Estimate(
            peak_bytes=max(peak, phases["merge"]),
            error_bytes=self._error(simulation, simulator),
            limit_bytes=machine.limit_bytes,
            host_peak_bytes=of_host if machine.device_type == "cuda" else peak,
            disk_bytes=overheads.disk_bytes(adapter, optimizer, recipe.checkpoint.keep, merged)
            + overheads.kept_base_bytes(*of_base),
            components=components,
            phases=phases,
            terms={**terms, "fragmentation": fragmentation, "dequantized_weights": round(worst.parts["workspace"])},
            tensor_bytes=round((worst.total - simulation.paged + slack) * factor) + terms.get("cublas_workspace", 0),
            paged_bytes=simulation.paged,
            tokens_per_second=speed.tokens_per_second if speed else 0.0,
            settings=settings_of(recipe, workload, self.baseline),
            calibrated_by=self.correction.runs,
            notes=self._notes(simulation, workload),
            limit_source=machine.source,
            ideal_tokens_per_second=self._most(simulation, workload),
            speed=speed,
            waiting_bytes=waiting,
            host_limit_bytes=machine.host_bytes,
            answers_at_once=ANSWERS_AT_ONCE if workload.draws is None else workload.draws.rows,
            savings=self._savings(workload, simulator),
        )

    def _savings(self, workload: Workload, simulator: Simulator) -> Mapping[str, Saving]:
        return levers.savings(self.text, workload, simulator.drawn, self.machine, simulator.spec.place)

    def _most(self, simulation: Simulation, workload: Workload) -> float:
        return throughput.most_tokens_per_second(simulation.work, self.machine.gpu, workload.rows * workload.length)

    def _speed(self, recipe: Recipe, facts: DataFacts | None, workload: Workload, simulator: Simulator) -> Speed | None:
        """Predicted, with an update after as many micro-batches as a step has; None without a card to predict it of."""
        simulation = simulator.run(workload)
        if (gpu := self.machine.gpu) is None or simulation.work is None:
            return None
        passes = -(-(batch_size_of(recipe, facts) or TYPICAL_BATCH) * workload.rows_of_pack // workload.rows)
        place, (weights, on_disk) = simulator.spec.place, self._on_disk(recipe, simulator)
        rows_bytes = 2 * workload.rows * workload.length * int(self.text.hidden_size)
        copies = throughput.Copies(
            to_card_up=weights,
            to_card_down=weights + simulation.pinned,
            to_host_up=simulation.pinned,
            looked_up=rows_bytes if place.host_embedding else 0,
            of_head=simulator.drawn.head_bytes,
            from_disk=on_disk,
        )
        return throughput.predict(simulation.work, gpu, workload.rows * workload.length, passes, copies)

    def _on_disk(self, recipe: Recipe, simulator: Simulator) -> tuple[int, int]:
        """Bytes of layers that come in each pass, and of them those that are read from files."""
        weights, shards = simulator.drawn.host_bytes - simulator.drawn.table_bytes, simulator.spec.place.shards
        return weights + levers.gathered(simulator.drawn, shards), from_disk(weights, self.machine.host_bytes, recipe)

    def simulated(self, recipe: Recipe, facts: DataFacts | None = None) -> tuple[Simulator, Workload]:
        """What an estimate of the recipe follows from."""
        return self.simulator(recipe), self._workload(recipe, facts, self.simulator(recipe))

    def _workload(self, recipe: Recipe, facts: DataFacts | None, simulator: Simulator) -> Workload:
        machine, workload = self.machine, workload_of(recipe, facts)
        if recipe.train.deterministic and machine.gpu is not None:
            workload = replace(workload, multiprocessors=most_multiprocessors(machine.gpu.gigabytes))
        workload = of_model(workload, int(self.text.num_hidden_layers))
        workload = replace(workload, asks=as_asked(facts.asks if facts else self.asks))
        limit = machine.limit_bytes - self._terms(False, rows_are_read=True)["context"]
        return at_once.drawing(at_once.asking(workload, simulator, limit), simulator, limit)

    def _terms(self, deterministic: bool, rows_are_read: bool) -> dict[str, int]:
        if self.machine.device_type != "cuda":
            return {"context": self.held + (0 if rows_are_read else host.READING_BYTES)}
        capability = self.machine.gpu.capability if self.machine.gpu else 86
        return {
            "context": overheads.context_bytes(self.machine.gpu)[0],
            **overheads.workspace_terms(capability, deterministic),
        }

    def _beside_tensors(self, simulation: Simulation, workload: Workload) -> int:
        """What the allocator keeps beyond live tensors; without a GPU, what a run adds to the process beside them."""
        if self.machine.device_type != "cuda":
            return host.added_bytes(simulation.worst.total, bool(workload.asks))
        return simulation.reserved.beyond

    def _error(self, simulation: Simulation, simulator: Simulator) -> int:
        factor, worst = self.correction.factor, simulation.worst
        tensors = round(worst.total * factor)
        if self.machine.device_type != "cuda":
            kept = simulation.kept
            copied = overheads.snapshot_bytes(kept["adapters"], kept["optimizer"], pinned=False)
            return margins.on_host(tensors, copied)
        weights = round(worst.parts["weights"] * factor)
        of_context = overheads.context_bytes(self.machine.gpu)[1]
        gaps = margins.Gaps(weights, simulator.drawn.cast_bytes)
        return margins.of_tensors(tensors, self.correction) + margins.of_gaps(tensors, gaps) + of_context

    def _notes(self, simulation: Simulation, workload: Workload) -> tuple[str, ...]:
        notes = []
        if self.correction.runs:
            runs, factor = self.correction.runs, self.correction.factor
            notes.append(f"calibrated by {runs} runs on this GPU: tensors × {factor:.3f}")
        if simulation.paged:
            notes.append("the paged optimizer state may move to host memory when the GPU is full; it is counted here")
        if self.baseline.name != "qlora":
            notes.append(f"as the stack {self.baseline.name!r} would train it, not as qlora-train does")
        if workload.asks:
            notes.append(f"study and exam: {most_rows(workload.asks)} prompts at once")
        if (draws := workload.draws) is not None:
            notes.append(f"answers: {draws.rows} drawn at once, of {draws.new} tokens to prompts of {draws.own}")
        if workload.samples:
            notes.append(f"samples: prompts of {workload.prompt_tokens} tokens, answers of {workload.new_tokens}")
        return tuple(notes)


def _by_whole_model(text: Any, name: str) -> bool:
    """Whether a few layers say nothing of the rest: no list has their kinds, or they share more than hidden states."""
    facts = facts_of(text, name)
    return bool(facts.layerwise or (facts.mixing and not getattr(text, "layer_types", None)))


def workload_of(recipe: Recipe, facts: DataFacts | None = None) -> Workload:
    """What a recipe's steps do. Without rows: every row is as long as it may be and holds several documents.

    Raises DoesNotFit for more tokens in a forward pass than can be simulated.
    """
    train = recipe.train
    rows = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    rows *= (rows_of_pack := facts.rows_of_pack if facts else 1)
    length = facts.longest if facts else recipe.data.max_length
    batch = batch_size_of(recipe, facts)
    evaluates = facts.has_eval if facts else bool(recipe.data.eval) or recipe.data.eval_fraction > 0
    samples = max(recipe.eval.samples, recipe.eval.exact_match_rows) if evaluates else 0
    if rows * length > MOST_TOKENS:
        what = (
            f"train.micro_batch_size = {rows:,} with data.max_length = {length:,}: {rows * length:,} tokens in one pass"
        )
        raise DoesNotFit(what, f"no memory holds more than {MOST_TOKENS:,}: lower train.micro_batch_size")
    draws = at_once.draws_of(recipe, facts.asked_tokens if facts else None, batch)
    length = length if draws is None else max(length, min(draws.own + draws.new, recipe.data.max_length))
    prompt = facts.prompt_tokens if facts else max(1, int(length * PROMPT_SHARE))
    exact = evaluates and recipe.eval.exact_match_rows > 0
    answer = facts.answer_tokens if facts else (length - prompt if exact else 0)  # the rest of the row
    return Workload(
        rows=rows,
        length=length,
        gradient_checkpointing=train.gradient_checkpointing is not False,
        recomputed=0 if isinstance(train.gradient_checkpointing, (bool, str)) else train.gradient_checkpointing,
        optimizer=train.optimizer,
        packed=recipe.data.packing,
        accumulates=batch is None or batch * rows_of_pack > rows,
        neftune_alpha=train.neftune_alpha,
        evaluates=evaluates,
        samples=samples if prompt else 0,
        prompt_tokens=prompt,
        new_tokens=max(SAMPLE_TOKENS, answer),
        documents=facts.documents if facts else 0,
        trained=min(max(facts.trained, draws.new if draws else 0), length) if facts else 0,
        offloads=recipe.memory.offload_activations is True,
        compares=train.objective not in ("sft", "grpo"),
        draws=draws,
        rows_of_pack=rows_of_pack,
    )


def batch_size_of(recipe: Recipe, facts: DataFacts | None) -> int | None:
    """Rows of a step; None where the recipe leaves it to rows that are not known."""
    batch = recipe.train.batch_size
    return (facts.batch_size if facts else None) or (None if batch == "auto" else batch * recipe.train.answers_per_row)


def settings_of(recipe: Recipe, workload: Workload, baseline: Baseline) -> dict[str, Any]:
    """The settings that an estimate is of, by their names in the recipe."""
    settings: dict[str, Any] = {
        "train.micro_batch_size": workload.rows // workload.rows_of_pack,
        "train.gradient_checkpointing": workload.recompute,
        "memory.stream_weights": recipe.memory.stream_weights is True,
        "memory.embedding": "host" if recipe.memory.embedding == "host" else "device",
        "memory.offload_activations": workload.offloads,
        "train.optimizer": workload.optimizer,
        "data.max_length": workload.length,
        "lora.r": recipe.lora.r,
        "quantization.type": recipe.quantization.type,
        "quantization.double_quant": recipe.quantization.double_quant,
        "model.attention": recipe.model.attention,
        "model.dtype": recipe.model.dtype,
    }
    settings |= {"memory.shard_weights": True} if Place.of(recipe.memory).shards > 1 else {}
    return settings if baseline.name == "qlora" else {**settings, "stack": baseline.name}
