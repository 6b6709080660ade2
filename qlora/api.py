"""The Python API: what each command does, without a screen. The work is done below: here it is put in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora import determinism, disk, files, numerics, run_folder, starting_adapter
from qlora.checked import Checked
from qlora.collections_off import without_collections
from qlora.device import current, lift_limit, release
from qlora.errors import DoesNotFit, ExportError, Problem, RecipeError, TrainingStopped, UserError
from qlora.events import Notice, Sink, Sinks
from qlora.guarded import guarded
from qlora.notebook import at_work, gate
from qlora.recipe.reading import Recipe, load_recipe, recipe_of_base
from qlora.recipe.sections import ExportSection
from qlora.report import results
from qlora.report.drawn import Drawn
from qlora.report.sinks import check_sinks, open_sinks
from qlora.rewards import sources
from qlora.stop import StopRequest
from qlora.study import defaults, material
from qlora.study.material import Found
from qlora.training import setup
from qlora.training.phases import PhaseClock

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qlora.export.artifacts import ExportedArtifact, ExportOptions, Report
    from qlora.export.combination import Combination
    from qlora.export.push import Push
    from qlora.memory.estimate import Estimate
    from qlora.memory.hardware import Machine, RunCard
    from qlora.memory.multi_gpu_question import MultiGpuQuestion
    from qlora.memory.question import Question
    from qlora.model.base_folder import BaseFolder
    from qlora.numerics import Numerics
    from qlora.training.checkpoint import Checkpoint, RunState

Mode = Literal["new", "resume", "fresh"]
MergeBase = Literal["auto", "nf4", "full"]


@dataclass(frozen=True)
class TrainResult(Drawn):
    """A finished run: its folder, where it ended, the delivered adapter, and what was exported.

    `set_aside` is the earlier run that mode="fresh" renamed, with its size.
    """

    run_dir: Path
    state: RunState
    adapter: Path
    exported: tuple[ExportedArtifact, ...]
    set_aside: disk.SetAside | None = None

    def history(self) -> dict[str, list[float]]:
        """What events.jsonl tells of each step, a list a column, as a table of pandas takes it: step, loss (nats a
        trained token), learning_rate, grad_norm, tokens_per_second, peak_bytes.

        Raises RunFolderError where the run wrote no events.
        """
        return results.history(self.run_dir)

    def drawing(self) -> RenderableType:
        return results.run_line(self.run_dir)

    def beside(self) -> str:
        return results.loss_curve(self.run_dir)


def train(
    recipe: Recipe | str | Path,
    *,
    name: str | None = None,
    mode: Mode = "new",
    sink: Sink | None = None,
    stop: StopRequest | None = None,
    rewards: Sequence[str] = (),
) -> TrainResult:
    """Train a recipe to its end, then export what it asks for.

    `name` is the run's folder in `output.dir`; a recipe file gives its own. `mode`: "new" refuses an existing run,
    "resume" goes on from its newest checkpoint, "fresh" renames it and starts anew. Raises the errors of
    `qlora.errors`. In a notebook it draws itself, without a `sink` of yours, and an interrupt saves and stops it.
    `rewards` are functions for objective = "grpo", each "FILE.py:FUNCTION": code that is run, so no recipe names any.
    """
    loaded, run_name = _named(recipe, name)
    with at_work(sink, stop, drawn="console" in loaded.report.sinks) as (shared, request):
        return _claimed(loaded, (run_name, rewards), mode, shared, request)


def _claimed(
    loaded: Recipe, named: tuple[str, Sequence[str]], mode: Mode, shared: Sinks, stop: StopRequest
) -> TrainResult:
    """Check the recipe, take its folder, and train there."""
    run_dir, open_length = run_folder.path_of(loaded, named[0]), not defaults.has_length(loaded)
    check_sinks(loaded)
    run_folder.check_claim(run_dir, loaded, mode)
    with guarded("setting up the run", "end other programs that hold memory, or use a smaller base"):
        if mode == "resume":
            loaded = run_folder.resumed(run_dir, loaded, shared)
        judged_by = sources.of_run(loaded.train, named[1], run_dir if mode == "resume" else None)
        loaded, documents = material.read(loaded, open_length, shared, run_dir if mode == "resume" else None)
        base, loaded = setup.preflight(loaded, shared)
        if mode != "resume":
            loaded = starting_adapter.settled(loaded, base, run_dir, shared)
        claim = run_folder.claim(run_dir, mode)
        try:
            if claim.aside is not None:
                shared.emit(Notice("run", f"a run was here before: {run_folder.kept(claim.aside)}"))
                material.take_over(claim.aside.folder, run_dir, shared)
            result = _train(loaded, run_dir, Found(base, documents, judged_by), mode, shared, stop)
            return replace(result, set_aside=claim.aside)
        finally:
            claim.release()


def _train(recipe: Recipe, run_dir: Path, found: Found, mode: Mode, sink: Sink, stop: StopRequest) -> TrainResult:
    """Train and export in a folder that is ours."""
    from qlora.model import row_packing
    from qlora.training import checkpoint

    base = found.base
    if mode != "resume":  # which goes on as its run recorded
        recipe = row_packing.settled(recipe, base.config, sink)
    disk.sweep_leftovers(run_dir)
    disk.sweep_leftovers(run_dir / "checkpoints")
    resume_from = checkpoint.newest(run_dir, sink) if mode == "resume" else None
    step = resume_from.state.step if resume_from else None
    if resume_from is not None:
        checkpoint.check_base(resume_from, base)
    if run_folder.write_recipe(run_dir, recipe, base.commit):  # first: from here on the folder is known to be a run's
        what = "a path in the recipe looks like a token or password: recipe.toml, and the adapter's files if it is the"
        sink.emit(Notice("secrets", f"{what} base's, hold it and can be read by you alone: publish none of them"))
    sources.write_record(run_dir, found.rewards)
    starting_adapter.take(recipe, run_dir, step, mode == "resume", sink)
    written = open_sinks(recipe, run_dir, step or 0, sink)
    sinks = Sinks(sink, *written)
    try:
        with determinism.for_run(recipe.train.deterministic, sinks):
            numbers = _begin(recipe, run_dir, base, resume_from, sinks)
            with numerics.in_force(numbers):
                state = _run(recipe, run_dir, found, (mode == "resume", resume_from), sinks, stop)
        exported = _export_trained(run_dir, recipe.export, sinks)
    finally:
        Sinks(*written).close()
        # The limit was the run's and its export's. Of a GPU that was lost, the error that ends the run says so.
        with suppress(RuntimeError):
            lift_limit(current())
    return TrainResult(run_dir, state, run_dir / "adapter", exported)


def _begin(recipe: Recipe, run_dir: Path, base: BaseFolder, resume_from: Checkpoint | None, sink: Sink) -> Numerics:
    """Say what will run, and what its numbers depend on; of a resumed run also what of that is another now."""
    from qlora import run_numerics

    device = setup.pick_device()
    recorded = resume_from.state.numerics if resume_from else None
    # A version that recorded nothing is no new run: what it could choose from, it chose.
    known = numerics.Numerics() if resume_from and recorded is None else recorded
    numbers = run_numerics.decide(recipe, base, device, known)
    step = resume_from.state.step if resume_from else None
    sink.emit(run_folder.start_event(recipe, run_dir, base.commit, str(device), numbers, step))
    if resume_from is not None:
        run_numerics.say_what_differs(resume_from.path, recorded, numbers, sink)
    return numbers


def _run(
    recipe: Recipe,
    run_dir: Path,
    found: Found,
    resumed: tuple[bool, Checkpoint | None],
    sink: Sink,
    stop: StopRequest,
) -> RunState:
    """Load and train; `resumed` is whether the run goes on, and from which checkpoint if it has one."""
    from qlora.model import chat_template, tokenizer_files
    from qlora.rewards import scoring
    from qlora.training import loop

    base, (goes_on, resume_from) = found.base, resumed
    choose = partial(chat_template.chosen, section=recipe.model, name=base.name, sink=sink)
    tokenizer = tokenizer_files.take(run_dir, base.path, goes_on, sink, choose)
    if goes_on:
        tokenizer = chat_template.as_before(tokenizer, base.name, run_dir / "adapter", sink)
    with (
        scoring.opened(recipe.train, found.rewards, sink) as judge,
        setup.prepare_job(recipe, run_dir, found, tokenizer, sink, stop) as job,
    ):
        job, device = replace(job, rewards=judge), job.device
        scoring.try_on(judge, job.data.train, sink)
        state = loop.run(job, resume_from)
        if job.exam is not None:
            job.exam.after(run_dir)
    del job
    release(device)  # an export needs the memory
    return state


def check(recipe: Recipe | str | Path, *, sink: Sink | None = None, rewards: Sequence[str] = ()) -> Checked:
    """Validate recipe, base, tokenizer, every row, and that it fits; stop before any weight is read. `rewards` as
    `train` takes them: they judge the rows' own answers.
    """
    from qlora import hours
    from qlora.model import row_packing
    from qlora.model.chat_template import chosen
    from qlora.model.tokenizer_files import read_files
    from qlora.rewards.scoring import opened, try_on
    from qlora.study.amount import Documents

    loaded, _ = _named(recipe, "check")
    check_sinks(loaded)
    with at_work(sink) as (shared, _), guarded("checking the recipe", "end other programs that hold memory"):
        open_length = not defaults.has_length(loaded)
        judged_by = sources.of_run(loaded.train, rewards)
        loaded, documents = material.read(loaded, open_length, shared)
        base, loaded = setup.preflight(loaded, shared)
        loaded = starting_adapter.settled(loaded, base, None, shared)
        loaded = row_packing.settled(loaded, base.config, shared)
        tokenizer = chosen(read_files(base.path), loaded.model, base.name, shared)
        found = Found(base, documents)
        _, data, memory, lesson = setup.prepare(loaded, found, tokenizer, shared, PhaseClock(shared))
        with opened(loaded.train, judged_by, shared) as judge:
            try_on(judge, data.train, shared)
        planned = memory.plan.estimate if memory.plan else None
        if lesson is None:
            return Checked(data, planned)
        known, to_come = Documents.of(lesson.passages, sum(data.train.lengths)), None
        if planned and memory.planner:
            estimator = memory.planner.estimator
            reckoned = hours.hours_of(loaded, known, open_length, estimator)
            to_come = hours.Ahead(reckoned, hours.memory_of(planned, estimator.machine.source))
        return Checked(lesson.foreseen(data)[1], planned, to_come)


def merge_and_export(
    source: str | Path | Sequence[str | Path],
    *,
    combine: Combination | None = None,
    to: str | Sequence[str] = "hf",
    quants: Sequence[str] = (),
    merge_base: MergeBase = "auto",
    base_model: str | Path | None = None,
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    push: Push | None = None,
    sink: Sink | None = None,
) -> Report:
    """Merge a run's adapter, or any PEFT LoRA folder, into its base, write it, reopen it and measure it.

    `to` is "hf", "gguf" or "adapter-gguf", or several of them; `quants` are the types of the GGUF files ("q8_0" when
    there are none). `merge_base`: "nf4" is the dequantized base that the adapter was trained against, "full" the
    original weights, "auto" the one that `choice` takes (without verification: what the adapter was trained on).
    `base_model` is the base's folder or hub name, where it is not the one that the adapter names; it must be the same
    base. `out` is the folder of a single product, the parent of several. Of several adapters, `combine` says how they
    become one; "adapter" is then a format too. `push` sends what was made to a repository of the hub; of one run,
    "adapter" then means the one that it delivered. What is there already, of just this request, is not made again.
    """
    with without_collections():
        from qlora.export.artifacts import ExportOptions, Report, plan_artifacts
        from qlora.export.push import Contents, made_before, open_destination
        from qlora.export.staging import check_part
        from qlora.export.targets import check_place
        from qlora.export_source import adapters_of, hash_of_request, name_of_all, produced
        from qlora.pushing import delivered

    chosen, formats = options or ExportOptions(), [to] if isinstance(to, str) else list(to)
    as_it_lies = push is not None and combine is None and "adapter" in formats
    formats = [name for name in formats if name != "adapter" or not as_it_lies]
    folders, default_out = adapters_of([source] if isinstance(source, str | Path) else source, combine, formats)
    target = files.user_path(out, "`out`") if out else None
    artifacts = plan_artifacts(formats, quants, target, default_out) if formats or not as_it_lies else []
    for artifact in artifacts:
        check_place(artifact.folder)
        check_part(artifact.folder)
    request = partial(hash_of_request, folders, combine, str(base_model), merge_base, chosen)
    asked = (base_model, merge_base, chosen, request)
    if push is None:
        with at_work(sink, results=False) as (shared, _):
            return produced(folders, combine, artifacts, asked, shared)
    if not chosen.verify:
        raise ExportError("what was not verified is not pushed", "leave out verify=False")
    if not artifacts and (quants or out or base_model):
        raise ExportError("a run's adapter is pushed as it lies", "leave out `quants`, `out` and `base_model`")
    keys = [artifact.key for artifact in artifacts] + ["adapter"] * as_it_lies
    contents = Contents(tuple(keys), frozenset({run_folder.dataset_name(name_of_all(folders))}))
    with at_work(sink, results=False) as (shared, _):
        destination = open_destination(push, contents)
        there = artifacts and all(artifact.folder.is_dir() for artifact in artifacts)
        report = Report(made_before(artifacts, request(), shared) if there else (), None)
        if artifacts and not report.products:
            report = produced(folders, combine, artifacts, asked, shared)
        places = [artifact.folder for artifact in artifacts] + folders[: int(as_it_lies)]
        return replace(report, pushed=delivered(destination, places, shared))


def export_options(**chosen: Any) -> ExportOptions:
    """`ExportOptions` of an export, for callers that must not import torch before they need it."""
    with without_collections():
        from qlora.export.artifacts import ExportOptions

    return ExportOptions(**chosen)


def estimate_memory(
    recipe: Recipe | str | Path,
    *,
    gpu: str | None = None,
    vram: str | None = None,
    stack: str = "qlora",
    sink: Sink | None = None,
) -> Estimate:
    """The predicted peak of a recipe (a file, or a hub name or folder alone) on a card, a size, or this machine.

    Needs no data and no weights: `config.json` is enough. Raises the errors of `qlora.errors`.
    """
    with at_work(sink) as (shared, _), guarded("estimating", "end other programs that hold memory"):
        loaded = recipe if isinstance(recipe, Recipe) else recipe_or_model(str(recipe))
        return question(loaded, gpu=gpu, vram=vram, stack=stack, sink=shared).estimate()


def recipe_or_model(what: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or the recipe that names the hub model or folder `what` and nothing else."""
    path = Path(os.path.expanduser(what))  # which leaves the home of an unknown user as it is
    if path.suffix == ".toml":  # as it was named: a link may lead to any name
        return load_recipe(path, overrides)
    if path.name == "config.json" and os.path.isfile(path):
        path = path.parent
    return recipe_of_base(str(path) if os.path.isdir(path) else what, overrides)


def question(
    recipe: Recipe, *, gpu: str | None = None, vram: str | None = None, stack: str = "qlora", sink: Sink | None = None
) -> Question:
    """What is asked about a recipe's memory, ready to be answered several times."""
    from qlora.memory import hardware
    from qlora.memory.baselines import BASELINES

    if gpu is not None and vram is not None:
        raise RecipeError([Problem("qlora-estimate", "`gpu` and `vram` both name the limit", "give one of them")])
    if stack not in BASELINES:
        raise RecipeError([Problem("qlora-estimate", f"no stack {stack!r}", f"one of: {', '.join(BASELINES)}")])
    return _question(recipe, hardware.asked_for(gpu, vram, recipe.memory.limit), stack, sink)


def _question(recipe: Recipe, machine: Machine, stack: str, sink: Sink | None) -> Question:
    from qlora.memory.baselines import BASELINES
    from qlora.memory.estimate import Estimator
    from qlora.memory.question import Question
    from qlora.model import row_packing
    from qlora.model.meta_model import text_config
    from qlora.model.resolve import resolve_config
    from qlora.study import room

    config = resolve_config(recipe.model.base, recipe.model.revision, gate(sink))
    text, _ = text_config(config, recipe.model.base)
    estimator = Estimator(text, recipe.model.base, machine, BASELINES[stack])
    recipe, estimator.asks, documents = room.foreseen(starting_adapter.sized(recipe), gate(sink))
    return Question(row_packing.settled(recipe, config, gate(sink)), estimator, documents)


def multi_gpu_question(recipe: Recipe, cards: Sequence[RunCard], *, sink: Sink | None = None) -> MultiGpuQuestion:
    """As `question`, about several cards of one run."""
    from qlora.memory.multi_gpu_question import MultiGpuQuestion

    first = cards[0].machine
    return MultiGpuQuestion.of(_question(recipe, first, "qlora", sink), cards)


def _export(run_dir: Path, section: ExportSection, sink: Sink) -> tuple[ExportedArtifact, ...]:
    """What [export] asks for, when training has ended."""
    if not section.formats:
        return ()
    to = [name.partition(":")[0] for name in section.formats]
    quants = [name.partition(":")[2] for name in section.formats if ":" in name]
    options = export_options(max_kl=section.max_kl, imatrix=section.imatrix)
    report = merge_and_export(run_dir, to=to, quants=quants, merge_base=section.base, options=options, sink=sink)
    return report.products


def _export_trained(run_dir: Path, section: ExportSection, sink: Sink) -> tuple[ExportedArtifact, ...]:
    """`_export`; what it refuses does not undo the training, whose result is named last."""
    try:
        return _export(run_dir, section, sink)
    except (UserError, DoesNotFit, TrainingStopped) as error:
        done = f"{error.hint}; the training itself is done, its adapter is {run_dir / 'adapter'}"
        kind = ExportError if isinstance(error, UserError) else type(error)
        raise kind(error.what, done) from error


def _named(recipe: Recipe | str | Path, name: str | None) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, name or "run"
    files.user_path(recipe, "the recipe")
    path = Path(recipe).expanduser()  # as it was named: a link may lead to any name and folder
    return Recipe.from_file(path), name or path.stem
