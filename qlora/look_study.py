"""A run's study, made before the run: asked, answered and filtered, for a look at what will be learnt.

It is the run's own, in the run's own folder and by the run's own phases: the run afterwards goes on from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files, foreign_json, run_folder
from qlora.errors import Problem, RecipeError, RunFolderError
from qlora.events import Notice, Sink, Sinks
from qlora.guarded import Guarded
from qlora.look import DRAWN_ROWS, Looked, papers_of, rows_of
from qlora.recipe.reading import Recipe
from qlora.run_record import is_run
from qlora.stop import StopRequest
from qlora.study import defaults, filters, material
from qlora.study.material import FOLDER, Found

if TYPE_CHECKING:
    from qlora.data.xray.look import Seen
    from qlora.model.tokenizer_files import TokenizerFiles
    from qlora.study.lesson import Learnt, Lesson

DROPPED_FILE = "dropped.jsonl"
EXAMPLES = 3  # of a reason, as long as no more is asked for
MAX_BYTES, MAX_LINE = 4 << 30, 1 << 20  # of dropped.jsonl
_NO_QUESTION = "no question"
_SAID: dict[str, str] = {
    **{str(reason): said for reason, said in filters.SAID.items()},
    _NO_QUESTION: "what was written is no question",
    "near an exam question": "near a question of the exam, which they would give away",
    "tells a sentence that is left out": "tell a sentence that is left out for the exam",
}


@dataclass(frozen=True)
class Asked:
    """A question and its answer; `detail`: what gave the reason why it is dropped, if it is."""

    question: str
    answer: str
    detail: str = ""


@dataclass(frozen=True)
class Lost:
    """Questions that are dropped for one reason: `said` in words, how many, and some of them."""

    reason: str
    said: str
    count: int
    examples: tuple[Asked, ...]


@dataclass(frozen=True)
class Studied:
    """What a study gave. `rows` to learn are `questions` alone and others beside them (with passages, and on other
    things); `known`: of the questions good to learn, those that the base answers without the documents. `sentences`, of
    which `with_question` are asked about; `without`: some that are not. `exam` and `left_out`: questions kept apart.
    `examples`: rows as they are learnt, without those that show passages."""

    folder: str
    rows: int
    questions: int
    known: int
    sentences: int
    with_question: int
    without: tuple[str, ...]
    exam: int
    left_out: int
    examples: tuple[Asked, ...]
    dropped: tuple[Lost, ...]


@dataclass(frozen=True)
class LookedAtStudy(Looked):
    """What was seen of a recipe whose documents have been studied; `rows` are then those of the study too."""

    study: Studied


def look_at_study(
    recipe: Recipe | str | Path,
    *,
    name: str | None = None,
    rows: int = DRAWN_ROWS,
    sink: Sink | None = None,
    stop: StopRequest | None = None,
) -> LookedAtStudy:
    """Study the documents of a recipe as its run would, in the folder that the run will have (`name`: see
    `qlora.train`), and look at what came of it. What was asked before is not asked again.

    Raises the errors of `qlora.errors`: RecipeError without documents, RunFolderError where that run trains already.
    """
    shared = Sinks(sink) if sink is not None else Sinks()
    if isinstance(recipe, Recipe):
        loaded, name = recipe, name or "run"
    else:
        files.user_path(recipe, "the recipe")
        path = Path(recipe).expanduser()
        loaded, name = Recipe.from_file(path), name or path.stem
    if not loaded.data.documents:
        hint = 'add [[data.documents]] with path = "manuals"'
        raise RecipeError([Problem("recipe", "there is nothing to study: no [[data.documents]]", hint)])
    run_dir, open_length = run_folder.path_of(loaded, name), not defaults.has_length(loaded)
    is_there = is_run(run_dir)
    _refuse_trained(run_dir)
    if not is_there:
        run_folder.check_claim(run_dir, loaded, "new")
    with Guarded("setting up the study", "end other programs that hold memory, or use a smaller base"):
        return _look(loaded, run_dir, open_length, (rows, is_there), shared, stop or StopRequest())


def _look(
    recipe: Recipe, run_dir: Path, open_length: bool, how: tuple[int, bool], sink: Sinks, stop: StopRequest
) -> LookedAtStudy:
    """`how`: rows to draw, and whether a run's folder is there that has trained nothing yet."""
    from qlora.model import chat_template, row_packing, tokenizer_files
    from qlora.training import setup

    rows, is_there = how
    recipe, found = material.read(recipe, open_length, sink)
    assert found is not None
    base, recipe = setup.preflight(recipe, sink)
    claim = run_folder.claim(run_dir, "resume" if is_there else "new")
    try:
        _refuse_trained(run_dir)  # again: much time may have passed
        recipe = row_packing.settled(recipe, base.config, sink)
        if run_folder.write_recipe(run_dir, recipe, base.commit):
            message = "a path in the recipe looks like a token or password: recipe.toml holds it, for you alone to read"
            sink.emit(Notice("secrets", message))
        choose = partial(chat_template.chosen, section=recipe.model, name=base.name, sink=sink)
        tokenizer = tokenizer_files.take(run_dir, base.path, False, sink, choose)
        with _studying(recipe, Found(base, found), tokenizer, sink, stop) as (lesson, teacher, phase):
            learnt = lesson.study(teacher, run_dir, phase)
            seen = _seen(run_dir / FOLDER, learnt, rows)
        shown = _rows(run_dir / FOLDER, tokenizer, (lesson, rows), sink)
        return LookedAtStudy(shown, papers_of(found, lesson, base.config), seen)
    finally:
        claim.release()


def _refuse_trained(run_dir: Path) -> None:
    if any((run_dir / "checkpoints").glob("step-*")) or (run_dir / "adapter").exists():
        hint = f"{run_dir / FOLDER} holds its rows and what was dropped; mode='fresh' of a run studies anew"
        raise RunFolderError(f"{run_dir}: this run has studied, and trains already", hint)


@contextmanager
def _studying(
    recipe: Recipe, found: Found, tokenizer: TokenizerFiles, sink: Sinks, stop: StopRequest
) -> Iterator[tuple[Lesson, Any, Any]]:
    """The lesson, its teacher and the clock of its phases, under what a run's numbers depend on."""
    from qlora import determinism, heap, numerics, run_numerics
    from qlora import device as hardware
    from qlora.model import emptied
    from qlora.model.cpu_matmul import fast_matmul
    from qlora.training import setup
    from qlora.training.phases import PhaseClock

    device, clock = setup.pick_device(), PhaseClock(sink)
    if not hardware.is_card(device):
        heap.settle()
    with determinism.for_run(recipe.train.deterministic, sink):
        numbers = run_numerics.decide(recipe, found.base, device, None)
        with numerics.in_force(numbers), fast_matmul(device):
            _, _, memory, lesson = prepared = setup.prepare(recipe, found, tokenizer, sink, clock)
            assert lesson is not None
            model = setup.load_model(recipe, found.base, prepared, clock)
            try:
                yield lesson, lesson.teacher(model, device, sink, stop, memory.beside_weights), clock.phase
            finally:
                emptied.empty(model)
                hardware.lift_limit(device)


def _rows(folder: Path, tokenizer: TokenizerFiles, of: tuple[Lesson, int], sink: Sinks) -> Seen | None:
    """The rows as any trainer reads them, token by token; None without a chat template, which they need for that."""
    lesson, rows = of
    return rows_of(lesson.as_source(folder), tokenizer, rows, sink) if lesson.frame == "chat" and rows else None


def _seen(folder: Path, learnt: Learnt, examples: int) -> Studied:
    split = learnt.studied.split
    covered = filters.coverage(learnt.passages, [*split.train, *split.hold])
    without = [sentence for passage in covered["passages"] for sentence in passage["without"]]
    few = max(EXAMPLES, examples)
    chosen = learnt.rows[: len(split.train)][:: max(1, len(split.train) // few)][:few]
    return Studied(
        folder=str(folder),
        rows=len(learnt.rows),
        questions=len(split.train),
        known=len(split.hold),
        sentences=covered["sentences"],
        with_question=covered["with_question"],
        without=tuple(without[:few]),
        exam=len(split.exam),
        left_out=len(split.left_out),
        examples=tuple(Asked(row.asked, row.answer) for row in chosen),
        dropped=_dropped(folder / DROPPED_FILE, few),
    )


def _dropped(file: Path, examples: int) -> tuple[Lost, ...]:
    """By reason, the most frequent first; read as if a stranger had written it. Raises RunFolderError."""
    found: dict[str, list[Asked]] = defaultdict(list)
    counted: dict[str, int] = defaultdict(int)
    try:
        with files.open_to_read(file, MAX_BYTES) as lines:
            while line := lines.readline(MAX_LINE):
                one = foreign_json.parse_object(line, str(file))
                reason = str(one.get("reason", ""))
                counted[reason] += 1
                if len(found[reason]) < examples:
                    asked = one.get("question") or one.get("text") or ""
                    found[reason].append(Asked(str(asked), str(one.get("answer") or ""), str(one.get("detail") or "")))
    except (foreign_json.ForeignFileError, files.UnsafePathError, OSError) as error:
        raise RunFolderError(
            f"{file}: cannot be read ({error})", "move the study's folder away, and study anew"
        ) from error
    order = sorted(counted, key=lambda reason: (-counted[reason], reason))
    return tuple(Lost(reason, _SAID.get(reason, reason), counted[reason], tuple(found[reason])) for reason in order)
