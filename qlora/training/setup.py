"""A run's set-up: from a recipe to a `Job` that the loop can train.

What is cheap to find wrong is found first: data files and the base's folder are checked before torch is imported (so
that this module imports it inside its functions), and a weight is read only when rows, tokenizer and template are known
to be good and the run is known to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora import disk, heap, processes, starting_adapter
from qlora.errors import HardwareError, Problem, RecipeError
from qlora.events import Sink
from qlora.guarded import Guarded
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import parse_bytes
from qlora.training.phases import PhaseClock

if TYPE_CHECKING:
    import torch

    from qlora.batch import Batch
    from qlora.data.chat import ChatTokenizer
    from qlora.data.prepare import PreparedData
    from qlora.model.base_folder import BaseFolder
    from qlora.model.base_watch import BaseWatch
    from qlora.model.tokenizer_files import TokenizerFiles
    from qlora.rewards.scoring import Rewards
    from qlora.stop import StopRequest
    from qlora.study.lesson import Lesson
    from qlora.study.material import Found
    from qlora.study.run_exam import RunExam
    from qlora.training.memory_plan import MemorySettings

_HINT = "end other programs that hold memory"
EVA_BATCHES = 64  # micro-batches that EVA looks at; its components settle long before (Paischer et al. 2024, section 4)


@dataclass(frozen=True)
class Job:
    """All that a run works on, ready to use: the model has its adapters, the rows are tokens."""

    recipe: Recipe
    run_dir: Path
    model: Any  # peft's wrapper around the causal LM
    base: BaseFolder
    tokenizer: TokenizerFiles
    chat: ChatTokenizer
    data: PreparedData
    device: torch.device
    sink: Sink
    stop: StopRequest
    memory: MemorySettings
    clock: PhaseClock
    watch: BaseWatch
    exam: RunExam | None = None  # of what documents taught
    rewards: Rewards | None = None  # what answers that grpo draws are worth


class Prepared(NamedTuple):
    """What is known of a run before a weight is read; `lesson` is what its documents will teach."""

    chat: ChatTokenizer
    data: PreparedData
    memory: MemorySettings
    lesson: Lesson | None


def preflight(recipe: Recipe, sink: Sink) -> tuple[BaseFolder, Recipe]:
    """What can be checked without torch: the data files are there and begin well, the base can be trained. Gives that,
    and the recipe with its `hub:` rows as the commits that they mean now, and as a base that thinks is studied.
    """
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import check_files
    from qlora.model.resolve import resolve
    from qlora.study import thinking

    if not recipe.data.train and not recipe.data.documents:
        hint = 'add [[data.train]] with path = "rows.jsonl", or [[data.documents]] with path = "manuals"'
        raise RecipeError([Problem("recipe", "no training rows: there is no [[data.train]]", hint)])
    rows = localize(recipe.data, sink)
    check_files(rows.local)
    base = resolve(recipe.model.base, recipe.model.revision, sink)
    return base, thinking.settled(recipe.model_copy(update={"data": rows.pinned}), base.path, sink)


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU. Raises HardwareError for a GPU that is too old to train."""
    from qlora import device as hardware

    processes.refuse_several()
    device = hardware.current()
    if not hardware.trains(device):
        raise HardwareError(
            f"{hardware.name_of(device)}: older than the GPUs that bitsandbytes computes 4 bit on (GTX 10 and newer)",
            "hide it with CUDA_VISIBLE_DEVICES= to train on the CPU, or use a newer GPU",
        )
    return device


@contextmanager
def prepare_job(
    recipe: Recipe, run_dir: Path, found: Found, tokenizer: TokenizerFiles, sink: Sink, stop: StopRequest
) -> Iterator[Job]:
    """Everything up to the first step. Inside the block the CPU multiplies as training needs it; behind it the job's
    model is empty.
    """
    from qlora import device as hardware
    from qlora import gathering
    from qlora.model import emptied
    from qlora.model.base_watch import BaseWatch
    from qlora.model.cpu_matmul import fast_matmul

    base, device, exam = found.base, pick_device(), None
    clock, watch = PhaseClock(sink), BaseWatch.begin(base)
    if not hardware.is_card(device):
        heap.settle()  # as the estimate takes for granted
    chat, data, memory, lesson = prepared = prepare(recipe, found, tokenizer, sink, clock)
    with fast_matmul(device), ExitStack() as stack:
        job = Job(recipe, run_dir, None, base, tokenizer, chat, data, device, sink, stop, memory, clock, watch)
        with gathering.loading(memory.place.shards, job):
            model = load_model(recipe, base, prepared, clock)
        stack.callback(emptied.empty, model)
        starting_adapter.put_on(model, recipe, base, run_dir)
        if lesson is not None:
            teacher = lesson.teacher(model, device, sink, stop, memory.beside_weights)
            recipe, data, exam = lesson.learn(teacher, run_dir, base, data, clock.phase)
        yield replace(job, recipe=recipe, model=model, data=data, exam=exam)


def prepare(recipe: Recipe, found: Found, tokenizer: TokenizerFiles, sink: Sink, clock: PhaseClock) -> Prepared:
    """Tokens of every row and the run's memory settings: all that can be known before a weight is read.

    Raises ExportError where the recipe asks for a GGUF that this base cannot become, DoesNotFit with remedies.
    """
    from qlora.data.token_ids import check_ids, say_stray_padding
    from qlora.export.verify.foresight import foresee_gguf, foresee_measuring
    from qlora.memory import hardware
    from qlora.model.meta_model import text_config
    from qlora.model.weight_names import embedding_rows
    from qlora.study.lesson import Lesson
    from qlora.training import memory_plan, questions

    base, planned = found.base, None
    lesson: Lesson | None = found.lesson
    with clock.phase("rows"):
        chat, data = prepare_rows(recipe, tokenizer, sink)
        asked = questions.questions_of(data.eval, chat, max(recipe.eval.samples, recipe.eval.exact_match_rows))
        rows = embedding_rows(base.tensors) or text_config(base.config, base.name)[0].vocab_size
        check_ids(chat.tokenizer, data, (question.prompt_ids for question in asked), rows, base.name)
        say_stray_padding(chat.tokenizer, rows, base.name, sink)
        if found.material is not None:
            lesson = Lesson.of(found.material, recipe, chat, sink)
        if lesson is not None:
            planned = lesson.foreseen(data)
    with clock.phase("checks", "plan memory"):
        foresee_gguf(recipe.export, base, tokenizer, chat.template, sink)
        foresee_measuring(recipe.export, base, hardware.this_machine(recipe.memory.limit).limit_bytes, sink)
        prompt_tokens = max((len(question.prompt_ids) for question in asked), default=0)
        exact = questions.answer_tokens(asked[: recipe.eval.exact_match_rows], chat)
        facts = memory_plan.data_facts(*(planned or (recipe, data)), prompt_tokens)
        facts = replace(facts, answer_tokens=exact, asks=lesson.batches if lesson else ())
        memory = memory_plan.plan_run(recipe, base, facts, sink)
    return Prepared(chat, data, memory, lesson)


def prepare_rows(recipe: Recipe, files: TokenizerFiles, sink: Sink) -> tuple[ChatTokenizer, PreparedData]:
    """Tokenizer, template and tokens of every row of the recipe's sources."""
    from qlora.data import eval_alone
    from qlora.data.chat import ChatTokenizer
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import prepare
    from qlora.model.tokenizer import open_tokenizer

    with files.placed() as folder:
        tokenizer = open_tokenizer(folder, recipe.model.base)
    chat = ChatTokenizer(tokenizer, recipe.data.loss_on, sink, files.embedding_rows)
    sources = localize(recipe.data, sink).local
    if not recipe.data.train:
        return chat, eval_alone.prepared(sources, files.fingerprint, chat, disk.cache_dir(), sink)
    return chat, prepare(sources, files.fingerprint, chat, recipe.train.seed, disk.cache_dir(), sink)


def load_model(recipe: Recipe, base: BaseFolder, prepared: Prepared, clock: PhaseClock) -> Any:
    """The quantized base with fresh adapters."""
    from qlora import device as hardware
    from qlora.memory.hardware import this_machine
    from qlora.memory.overheads import context_bytes
    from qlora.model import adapters, load, lora_functions, precision

    device, data, chat = pick_device(), prepared.data, prepared.chat
    hardware.release(device)  # an earlier run's model may still be held by what refers to itself
    hardware.limit_memory(device, parse_bytes(recipe.memory.limit), context_bytes(this_machine().gpu)[0])
    dtype = precision.of_run()
    with clock.phase("load"), Guarded("loading the base", f"{_HINT}, or use a smaller base"):
        kept = replace(base, cache=recipe.memory.cache)
        settings = (recipe.quantization, recipe.model.attention, device, clock.sink, prepared.memory.place)
        model = load.load_base(kept, *settings, dtype=dtype)
    eva = recipe.lora.init == "eva"
    hint = f'{_HINT}, lower data.max_length, or set lora.init = "default"' if eva else f"{_HINT}, or lower lora.r"
    with clock.phase("load", "attach adapters"), Guarded("attaching the adapters", hint):
        batches = _eva_batches(recipe, data, chat.pad_id, device) if eva else None
        tuned = adapters.attach(model, recipe.lora, recipe.train.seed, dtype, batches)
    lora_functions.say_what_stays(tuned, recipe.lora, clock.sink)
    return tuned


def _eva_batches(recipe: Recipe, data: PreparedData, pad_id: int, device: torch.device) -> list[Batch]:
    from qlora.data.loader import TrainOrder, collate

    rows = recipe.train.micro_batch_size
    order = TrainOrder(data.train, recipe.data, recipe.train.seed, 1 if rows == "auto" else rows)
    return [
        collate(data.train, order.packs_of_step(step), pad_id, recipe.data.max_length).to(device)
        for step in range(min(EVA_BATCHES, order.steps(1.0)))
    ]
