"""The Python API: what each command does, without a screen.

What is cheap to find wrong is found first: recipe, run folder, data files and the base's folder are checked before
torch is imported, and a weight is read only when rows, tokenizer and template are known to be good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora import disk, run_folder
from qlora.errors import ExportError, Problem, RecipeError
from qlora.events import Notice, Sink, Sinks
from qlora.recipe.reading import Recipe, load_recipe, recipe_of_base
from qlora.recipe.sections import ExportSection
from qlora.report.files import JsonLines

if TYPE_CHECKING:
    import torch

    from qlora.data.chat import ChatTokenizer
    from qlora.data.prepare import PreparedData
    from qlora.export.artifacts import ExportedArtifact, ExportOptions, Report, RunRows, Source
    from qlora.memory.estimate import Estimate
    from qlora.memory.plan import Question
    from qlora.model.base_folder import BaseFolder
    from qlora.stop import StopRequest
    from qlora.training.checkpoint import RunState
    from qlora.training.recovery import MemorySettings

Mode = Literal["new", "resume", "fresh"]
EVA_BATCHES = 64  # micro-batches that EVA looks at; its components settle long before (Paischer et al. 2024, section 4)


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, where it ended, the delivered adapter, and what was exported."""

    run_dir: Path
    state: RunState
    adapter: Path
    exported: tuple[ExportedArtifact, ...]


def train(
    recipe: Recipe | str | Path,
    *,
    name: str | None = None,
    mode: Mode = "new",
    sink: Sink | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train a recipe to its end, then export what it asks for.

    `name` is the run's folder in `output.dir`; a recipe file gives its own. `mode`: "new" refuses an existing run,
    "resume" goes on from its newest checkpoint, "fresh" renames it and starts anew. Raises the errors of
    `qlora.errors`.
    """
    from qlora.data import hub_rows

    loaded, run_name = _named(recipe, name)
    say = sink or Sinks()
    run_dir = run_folder.path_of(loaded, run_name)
    run_folder.check_claim(run_dir, loaded, mode)
    if mode == "resume":
        loaded = run_folder.pinned(run_dir, loaded)
    base = preflight(loaded, say)
    loaded = loaded.model_copy(update={"data": hub_rows.localize(loaded.data, say).pinned})
    held = run_folder.claim(run_dir, mode)
    try:
        return _train(_Ready(loaded, run_dir, base, mode), say, stop)
    finally:
        held.release()


@dataclass(frozen=True)
class Checked:
    """A recipe that is good: its rows as tokens, and the memory it will take (None where that cannot be told)."""

    data: PreparedData
    memory: Estimate | None


def check(recipe: Recipe | str | Path, *, sink: Sink | None = None) -> Checked:
    """Validate recipe, base, tokenizer, every row, and that it fits; stop before any weight is read."""
    loaded, _ = _named(recipe, "check")
    say = sink or Sinks()
    base = preflight(loaded, say)
    chat, data = _prepare(loaded, base, say)
    _foresee_gguf(loaded.export, base, chat, say)
    memory = _fit(loaded, base, chat, data, say)
    return Checked(data, None if memory.plan is None else memory.plan.estimate)


def preflight(recipe: Recipe, sink: Sink) -> BaseFolder:
    """What can be checked without torch: the data files are there and begin well, the base can be trained."""
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import check_files
    from qlora.model.resolve import resolve

    if not recipe.data.train:
        hint = 'add [[data.train]] with path = "rows.jsonl"'
        raise RecipeError([Problem("recipe", "no training rows: there is no [[data.train]]", hint)])
    check_files(localize(recipe.data, sink).local)
    return resolve(recipe.model.base, recipe.model.revision, sink)


def merge_and_export(
    source: str | Path,
    *,
    to: str | Sequence[str] = "hf",
    quants: Sequence[str] = (),
    merge_base: Literal["auto", "nf4", "full"] = "auto",
    out: str | Path | None = None,
    options: ExportOptions | None = None,
    sink: Sink | None = None,
) -> Report:
    """Merge a run's adapter, or any PEFT LoRA folder, into its base, write it, reopen it and measure it.

    `to` is "hf", "gguf" or "adapter-gguf", or several of them; `quants` are the types of the GGUF files ("q8_0" when
    there are none). `merge_base`: "nf4" is the dequantized base that the adapter was trained against, "full" the
    original weights, "auto" the one that is measured nearer to the trained model (without verification: nf4 where the
    adapter was trained on a quantized base). `out` is the folder of a single product, the parent of several.
    """
    from qlora.export.artifacts import ExportOptions, plan_products
    from qlora.export.pipeline import produce
    from qlora.model.cpu_matmul import fast_matmul

    say = sink or Sinks()
    chosen = options or ExportOptions()
    place = Path(source).expanduser().resolve()
    adapter_dir, default_out = run_folder.adapter_of(place)
    target = Path(out).expanduser().resolve() if out else None
    products = plan_products([to] if isinstance(to, str) else to, quants, target, default_out)
    for product in products:
        run_folder.refuse_foreign_folder(product.folder)
    opened = _open_source(adapter_dir, say)
    if chosen.verify or chosen.imatrix or any(product.key.endswith("gguf") for product in products):
        opened = replace(opened, rows=_rows_of(adapter_dir, opened, say))
    with fast_matmul(opened.device):
        return produce(opened, products, merge_base, chosen, say)


def export_options(**chosen: Any) -> ExportOptions:
    """`ExportOptions` of an export, for callers that must not import torch before they need it."""
    from qlora.export.artifacts import ExportOptions

    return ExportOptions(**chosen)


def _open_source(adapter_dir: Path, sink: Sink) -> Source:
    """An adapter with its base, checked; its rows are not read yet."""
    from qlora.export.artifacts import Source
    from qlora.model.adapter_folder import provenance, read_adapter
    from qlora.model.resolve import resolve

    adapter = read_adapter(adapter_dir)
    origin = provenance(adapter_dir, adapter.config)
    base = resolve(origin.base, origin.revision, sink)
    if origin.fingerprint and origin.fingerprint != base.fingerprint:
        raise ExportError(
            f"{adapter_dir}: was trained on another base than {base.name} is now (its files differ)",
            f"put the base back as it was at training ({origin.revision}), or train again",
        )
    recipe = run_folder.recipe_of(adapter_dir)
    sources = recipe.data.train if recipe is not None else ()
    datasets = tuple(dict.fromkeys(run_folder.dataset_name(source.path) for source in sources))
    return Source(run_folder.name_of(adapter_dir), adapter, origin, base, pick_device(), datasets)


def _rows_of(adapter_dir: Path, source: Source, sink: Sink) -> RunRows | None:
    """The rows of the adapter's run as tokens; None, said aloud, where there is no run or its files are gone."""
    from qlora.errors import UserError
    from qlora.export.artifacts import RunRows

    recipe = run_folder.recipe_of(adapter_dir)
    if recipe is None:
        return None
    try:
        chat, data = _prepare(recipe, source.base, Sinks())
    except UserError as error:
        sink.emit(Notice("rows", f"the run's rows cannot be read any more ({error.what})"))
        return None
    return RunRows(data, recipe.data, chat)


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
    loaded = recipe if isinstance(recipe, Recipe) else recipe_or_model(str(recipe))
    return question(loaded, gpu=gpu, vram=vram, stack=stack, sink=sink).estimate()


def recipe_or_model(what: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file, or the recipe that names the hub model or folder `what` and nothing else."""
    path = Path(what).expanduser()
    if path.suffix == ".toml":
        return load_recipe(path, overrides)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    return recipe_of_base(str(path) if path.is_dir() else what, overrides)


def question(
    recipe: Recipe, *, gpu: str | None = None, vram: str | None = None, stack: str = "qlora", sink: Sink | None = None
) -> Question:
    """What is asked about a recipe's memory, ready to be answered several times."""
    from qlora.memory import hardware
    from qlora.memory.baselines import BASELINES
    from qlora.memory.estimate import Estimator
    from qlora.memory.plan import Question
    from qlora.model.meta_model import text_config
    from qlora.model.resolve import resolve_config

    if gpu is not None and vram is not None:
        problem = Problem("qlora-estimate", "--gpu and --vram both name the limit", "give one of them")
        raise RecipeError([problem])
    if stack not in BASELINES:
        raise RecipeError([Problem("qlora-estimate", f"no stack {stack!r}", f"one of: {', '.join(BASELINES)}")])
    machine = hardware.asked_for(gpu, vram, recipe.memory.limit)
    config = resolve_config(recipe.model.base, recipe.model.revision, sink or Sinks())
    text, _ = text_config(config, recipe.model.base)
    return Question(recipe, Estimator(text, recipe.model.base, machine, BASELINES[stack]))


def pick_device() -> torch.device:
    """The GPU where there is one that computes in bf16, else the CPU. Raises HardwareError for older GPUs."""
    from qlora import device as hardware
    from qlora.errors import HardwareError

    device = hardware.current()
    if not hardware.computes_bf16(device):
        raise HardwareError(
            f"{hardware.name_of(device)}: computes no bf16 (that came with Ampere, RTX 30)",
            "hide it with CUDA_VISIBLE_DEVICES= to train on the CPU, or use a newer GPU",
        )
    return device


# --- the phases of a training run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ready:
    """A run whose cheap checks are done."""

    recipe: Recipe
    run_dir: Path
    base: BaseFolder
    mode: Mode


def _train(ready: _Ready, sink: Sink, stop: StopRequest | None) -> TrainResult:
    from qlora.model.cpu_matmul import fast_matmul
    from qlora.stop import StopRequest
    from qlora.training import checkpoint, loop

    recipe, run_dir, base = ready.recipe, ready.run_dir, ready.base
    disk.sweep_leftovers(run_dir)
    disk.sweep_leftovers(run_dir / "checkpoints")
    resume_from = checkpoint.newest(run_dir, sink) if ready.mode == "resume" else None
    step = resume_from.state.step if resume_from else None
    run_folder.write_recipe(run_dir, recipe, base.commit)
    files = [JsonLines(run_dir / run_folder.EVENTS_FILE, step or 0)] if "jsonl" in recipe.report.sinks else []
    say = Sinks(sink, *files)
    try:
        say.emit(run_folder.start_event(recipe, run_dir, base.commit, str(pick_device()), step))
        chat, data = _prepare(recipe, base, say)
        _foresee_gguf(recipe.export, base, chat, say)
        memory = _fit(recipe, base, chat, data, say)
        with fast_matmul(pick_device()):
            model = _model(recipe, base, data, chat, say)
            device = next(model.parameters()).device
            pad_id = chat.pad_id
            job = loop.Job(recipe, run_dir, model, base, chat, data, device, pad_id, say, stop or StopRequest(), memory)
            state = loop.run(job, resume_from)
            del model, job
        exported = _export(run_dir, recipe.export, say)
    finally:
        for file in files:
            file.close()
    return TrainResult(run_dir, state, run_dir / "adapter", exported)


def _foresee_gguf(section: ExportSection, base: BaseFolder, chat: ChatTokenizer, sink: Sink) -> None:
    """Say before training whether its result can become a GGUF; raise ExportError where the recipe asks for one."""
    from qlora.export.gguf.plan import Tokens, plan

    quants = [name.removeprefix("gguf:") for name in section.formats if name.startswith("gguf:")]
    try:
        foreseen = plan(base, None, Tokens(template=chat.template), quants, section.imatrix)
    except ExportError as error:
        if any("gguf" in name for name in section.formats):
            raise
        sink.emit(Notice("gguf", f"a model trained on this base cannot be exported as GGUF: {error.what}"))
        return
    vocab = foreseen.vocab.pre if foreseen.vocab.model == "gpt2" else "SentencePiece"
    sink.emit(Notice("gguf", f"this base exports to GGUF: {foreseen.layout.arch}, tokenizer {vocab}"))
    for notice in foreseen.notices:
        sink.emit(Notice("gguf", notice))


def _export(run_dir: Path, section: ExportSection, sink: Sink) -> tuple[ExportedArtifact, ...]:
    """What [export] asks for, when training has ended."""
    if not section.formats:
        return ()
    kinds = dict.fromkeys(name.partition(":")[0] for name in section.formats)
    quants = [name.partition(":")[2] for name in section.formats if ":" in name]
    options = export_options(max_kl=section.max_kl, imatrix=section.imatrix)
    report = merge_and_export(
        run_dir, to=list(kinds), quants=quants, merge_base=section.base, options=options, sink=sink
    )
    return report.products


def _prepare(recipe: Recipe, base: BaseFolder, sink: Sink) -> tuple[ChatTokenizer, PreparedData]:
    """Tokenizer, template and tokens of every row."""
    from qlora.data.chat import ChatTokenizer
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import prepare
    from qlora.model.tokenizer import open_tokenizer, tokenizer_fingerprint

    tokenizer = open_tokenizer(base.path, base.name)
    chat = ChatTokenizer(tokenizer, recipe.data.loss_on, sink)
    sources = localize(recipe.data, sink).local
    data = prepare(sources, tokenizer_fingerprint(base.path), chat, recipe.train.seed, disk.cache_dir(), sink)
    return chat, data


def _fit(recipe: Recipe, base: BaseFolder, chat: ChatTokenizer, data: PreparedData, sink: Sink) -> MemorySettings:
    """What the run may take, decided before a weight is read. Raises DoesNotFit."""
    from qlora.training import memory_plan

    return memory_plan.plan_run(recipe, base, memory_plan.data_facts(recipe, data, chat), sink)


def _model(recipe: Recipe, base: BaseFolder, data: PreparedData, chat: ChatTokenizer, sink: Sink) -> Any:
    """The quantized base with fresh adapters."""
    from qlora.data.loader import TrainOrder, collate
    from qlora.model import adapters, load

    device = pick_device()
    model = load.load_base(base, recipe.quantization, recipe.model.attention, device, sink)
    batches = None
    if recipe.lora.init == "eva":
        rows = recipe.train.micro_batch_size
        order = TrainOrder(data.train, recipe.data, recipe.train.seed, 1 if rows == "auto" else rows)
        count = min(EVA_BATCHES, order.steps(1.0))
        batches = [
            collate(data.train, order.packs_of_step(step), chat.pad_id, recipe.data.max_length).to(device)
            for step in range(count)
        ]
    return adapters.attach(model, recipe.lora, recipe.train.seed, eva_batches=batches)


def _named(recipe: Recipe | str | Path, name: str | None) -> tuple[Recipe, str]:
    if isinstance(recipe, Recipe):
        return recipe, name or "run"
    path = Path(recipe)
    return Recipe.from_file(path), name or path.stem
