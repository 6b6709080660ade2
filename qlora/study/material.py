"""A recipe's documents, read before anything heavy is imported, and the keys that follow from how much there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora import disk, files, foreign_json
from qlora.data.documents.chunks import Passage
from qlora.data.documents.document import Documents
from qlora.data.documents.kinds import KINDS
from qlora.data.documents.read import read_documents
from qlora.data.row_json import RowError
from qlora.data.source_files import find_files
from qlora.document_keys import DocumentsSection
from qlora.errors import DataError, Problem, RecipeError, RunFolderError, TrainingStopped
from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import EvalSection
from qlora.rewards.sources import RewardSource
from qlora.shown import one_line
from qlora.stop import StopAsked, StopRequest
from qlora.study import defaults, exam_questions
from qlora.units import counted

if TYPE_CHECKING:
    from qlora.model.base_folder import BaseFolder

FOLDER = "study"  # in a run's folder
RECORDS = ("questions.jsonl", "answers.jsonl", "labels.bin")  # what a new study of the same documents may take over
MAX_BYTES = 64 << 30  # of one of them
STUDIED_FILE = "documents.json"  # written when a study has come to its end
MOST_EXTRA = 0.8  # share of rows that are no questions alone


@dataclass(frozen=True)
class Material:
    """What is to be learnt. `decides_length`: the study says how many epochs there are, the recipe does not.

    `hashes`: sha256 of each document, by its shown path. `passages`: as a run's study recorded them, where the
    documents themselves are gone.
    """

    documents: Documents
    decides_length: bool
    hashes: Mapping[str, str]
    passages: tuple[Passage, ...] | None = None


class Found(NamedTuple):
    """What a run was given: its base, its documents where it has some, what judges the answers that it draws, or the
    lesson that another process had of the documents (`training/handing.py`)."""

    base: BaseFolder
    material: Material | None
    rewards: tuple[RewardSource, ...] = ()
    lesson: Any = None


def read(
    recipe: Recipe, decides_length: bool, sink: Sink, resumed: Path | None = None
) -> tuple[Recipe, Material | None]:
    """The recipe's documents, and the recipe with what it does not set as they ask for; None without documents.

    `decides_length`: nobody has said how long to train. `resumed`: the folder of the run that goes on. Raises
    RecipeError for keys that documents forbid, DataError for files that cannot be read, and RunFolderError where a run
    trains already on documents that were others.
    """
    if plain := sum(source.format == "documents" for source in recipe.data.train):
        message = "documents as plain text teach their style and words, hardly their facts: [[data.documents]] does"
        sink.emit(Notice("documents", message, plain))
    if not recipe.data.documents:
        return recipe, None
    _check(recipe)
    exam_questions.read_yours(recipe.exam.own, "en")  # for what is wrong with them
    studied = None if resumed is None else _studied(resumed)
    there = recipe.data.documents if studied is None else [one for one in recipe.data.documents if not _is_gone(one)]
    documents = read_documents(there, sink)
    hashes = {document.path: document.sha256 for document in documents.documents}
    material = Material(documents, decides_length, hashes)
    if studied is not None and resumed is not None:
        material = _gone_on_with(material, studied, resumed, sink)
    recipe, derived = defaults.of_corpus(recipe, documents.pages)
    if derived:
        pages = counted(documents.pages, "page")
        sink.emit(Notice("documents", f"for {pages}: {', '.join(derived)}", len(derived)))
    return recipe, material


def _studied(run_dir: Path) -> dict[str, Any] | None:
    """The documents that a run has studied to the end, with their hashes; None where it has not come so far."""
    file, trains = run_dir / FOLDER / STUDIED_FILE, _trains(run_dir)
    if not file.is_file():
        return None
    try:
        return foreign_json.load_object(file)
    except foreign_json.ForeignFileError as error:
        if trains:
            raise RunFolderError(str(error), "start anew with mode='fresh'") from error
        return None


def _trains(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step-*"))


def _is_gone(source: DocumentsSection) -> bool:
    """Whether nothing that could be read stands where a source of documents was."""
    try:
        find_files(source.path, KINDS, count_others=True)
    except DataError:
        return True
    return False


def _gone_on_with(material: Material, studied: Mapping[str, Any], run_dir: Path, sink: Sink) -> Material:
    """What a run goes on with that has studied its documents. Raises RunFolderError where it trains already and one of
    them has changed since.

    Where they are only gone it needs them no more: it goes on with the passages that it recorded. Before it trains, a
    document that changed or left a folder is one that is to be learnt otherwise.
    """
    now, trains = material.hashes, _trains(run_dir)
    changed = sorted(name for name in now if studied.get(name) != now[name])
    gone = sorted(name for name in studied if name not in now)
    if trains and changed:
        what = f"{run_dir}: its documents have changed since they were studied: {', '.join(map(one_line, changed[:5]))}"
        hint = "put them back to go on; mode='fresh' starts anew and asks only about what has changed"
        raise RunFolderError(what, hint)
    if not gone or (now and not trains):
        return material
    names = ", ".join(map(one_line, gone[:5])) + ", …" * (len(gone) > 5)
    message = f"gone since they were studied: {len(gone):,} ({names}); the run goes on with what it recorded of them"
    sink.emit(Notice("documents", message, len(gone)))
    hashes = {name: str(value) for name, value in studied.items()}
    return replace(material, hashes=hashes, passages=tuple(exam_questions.load_passages(run_dir / FOLDER)))


def _check(recipe: Recipe) -> None:
    study = recipe.study
    problems = []
    if recipe.lora.init == "eva":
        what = 'lora.init = "eva" starts from rows, and documents have theirs from the model that it starts'
        problems.append(Problem("recipe", what, 'set lora.init = "default"'))
    if study.with_passage + study.hold > MOST_EXTRA:
        what = f"study.with_passage + study.hold are {study.with_passage + study.hold:g}, over {MOST_EXTRA}"
        problems.append(Problem("recipe", what, "lower them: the rest are the questions alone, which teach the most"))
    # What is off, or as it is anyway, asks for nothing: the recipe that a run recorded has every key.
    asked = [
        f"eval.{key}"
        for key in EvalSection.model_fields
        if getattr(recipe.eval, key) not in (0, EvalSection.model_fields[key].default)
    ]
    if "eval_fraction" in recipe.data.model_fields_set and recipe.data.eval_fraction:
        asked.append("data.eval_fraction")
    if not recipe.data.train and not recipe.data.eval and asked:
        what = f"{', '.join(asked)}: there are no rows to evaluate, only documents, whose rows are all trained"
        hint = "take it out: the exam measures what was learnt; or add [[data.eval]] with a path"
        problems.append(Problem("recipe", what, hint))
    if problems:
        raise RecipeError(problems)


def take_over(before: Path, run_dir: Path, sink: Sink) -> None:
    """What an earlier run of the same name asked and was answered: records that follow from something else are not
    looked at, so that a changed document is asked about anew where it changed."""
    taken = 0
    for name in RECORDS:
        source = before / FOLDER / name
        if source.is_file() and not files.is_link(source):
            disk.make_folder(run_dir / FOLDER)
            target = run_dir / FOLDER / name
            with files.open_to_read(source, MAX_BYTES) as old, disk.open_to_write(target, "new") as new:
                while block := old.read(1 << 20):
                    files.write_all(new, block)
            taken += 1
    if taken:
        sink.emit(Notice("study", f"what {before / FOLDER} holds of unchanged passages is not asked again"))


@contextmanager
def keeping(stop: StopRequest, folder: Path) -> Iterator[None]:
    """A stop inside, and a disk that is full, end the run with what was asked so far in the study's `folder`."""
    kept, hint = f"what was asked and answered so far is kept in {folder}", "continue with mode='resume'"
    try:
        with stop.being_read():
            yield
    except StopAsked:
        raise stop.error(kept, hint) from None
    except RowError as error:  # a signal to the whole group ends the process that renders prompts as well
        if stop.is_set:
            raise stop.error(kept, hint) from None
        raise DataError(
            f"a prompt of the study cannot be rendered: {error.reason}; {kept}", error.hint or hint
        ) from error
    except OSError as error:
        if error.errno not in disk.DISK_FULL:
            raise
        what = f"{folder}: the disk is full ({error.strerror}); what was asked and answered so far is kept"
        raise TrainingStopped(what, f"free some space there, then {hint}") from error
