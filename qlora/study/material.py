"""A recipe's documents, read before anything heavy is imported, and the keys that follow from how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qlora import disk, files
from qlora.data.documents.document import Documents
from qlora.data.documents.read import read_documents
from qlora.data.row_json import RowError
from qlora.errors import DataError, Problem, RecipeError, TrainingStopped
from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.stop import StopAsked, StopRequest
from qlora.study import defaults, exam_questions

if TYPE_CHECKING:
    from qlora.model.base_folder import BaseFolder

FOLDER = "study"  # in a run's folder
RECORDS = ("questions.jsonl", "answers.jsonl", "labels.bin")  # what a new study of the same documents may take over
MAX_BYTES = 64 << 30  # of one of them
MOST_EXTRA = 0.8  # share of rows that are no questions alone


@dataclass(frozen=True)
class Material:
    """What is to be learnt. `decides_length`: the study says how many epochs there are, the recipe does not."""

    documents: Documents
    decides_length: bool


class Found(NamedTuple):
    """What a run was given: its base, and its documents where it has some."""

    base: BaseFolder
    material: Material | None


def read(recipe: Recipe, decides_length: bool, sink: Sink) -> tuple[Recipe, Material | None]:
    """The recipe's documents, and the recipe with what it does not set as they ask for; None without documents.

    `decides_length`: nobody has said how long to train. Raises RecipeError for keys that documents forbid, DataError
    for files that cannot be read.
    """
    if plain := sum(source.format == "documents" for source in recipe.data.train):
        message = "documents as plain text teach their style and words, hardly their facts: [[data.documents]] does"
        sink.emit(Notice("documents", message, plain))
    if not recipe.data.documents:
        return recipe, None
    _check(recipe)
    exam_questions.read_yours(recipe.exam.own, "en")  # for what is wrong with them
    documents = read_documents(recipe.data.documents, sink)
    recipe, derived = defaults.of_corpus(recipe, documents.pages)
    if derived:
        sink.emit(Notice("documents", f"for {documents.pages:,} pages: {', '.join(derived)}", len(derived)))
    return recipe, Material(documents, decides_length)


def _check(recipe: Recipe) -> None:
    study = recipe.study
    problems = []
    if recipe.lora.init == "eva":
        what = 'lora.init = "eva" starts from rows, and documents have theirs from the model that it starts'
        problems.append(Problem("recipe", what, 'set lora.init = "default"'))
    if study.with_passage + study.hold > MOST_EXTRA:
        what = f"study.with_passage + study.hold are {study.with_passage + study.hold:g}, over {MOST_EXTRA}"
        problems.append(Problem("recipe", what, "lower them: the rest are the questions alone, which teach the most"))
    asked = recipe.eval.exact_match_rows or recipe.eval.early_stopping_patience
    fraction = recipe.data.eval_fraction if "eval_fraction" in recipe.data.model_fields_set else 0
    if not recipe.data.train and not recipe.data.eval and (asked or fraction):
        key = "[eval] asks for evaluation rows" if asked else "data.eval_fraction holds out rows of [[data.train]]"
        what = f"{key}, and there are only documents, whose rows are all trained: the exam measures them"
        problems.append(Problem("recipe", what, "take it out, or add [[data.eval]] with a path"))
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
