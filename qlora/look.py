"""A look at a recipe's rows before anything is trained: what the model will see, counted and drawn.

The same preparation as a run's, with the same cache of tokens; of the base its configuration and tokenizer alone.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files
from qlora.errors import Problem, RecipeError
from qlora.events import Notice, Sink, Sinks
from qlora.guarded import Guarded
from qlora.hours import Ahead, ahead
from qlora.recipe.reading import Recipe

if TYPE_CHECKING:
    from qlora.data.documents.document import LeftOut
    from qlora.data.xray.look import Seen
    from qlora.model.tokenizer_files import TokenizerFiles
    from qlora.study.lesson import Lesson
    from qlora.study.material import Material

DRAWN_ROWS = 3


@dataclass(frozen=True)
class Read:
    """A document that will be studied; `left_out`: what of it was not read, and why."""

    path: str
    pages: int
    language: str
    passages: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Papers:
    """What [[data.documents]] brings. `questions` are asked for training at most; `left_out` are whole files; `takes`:
    what the study takes beside the base's weights, in words; `ahead`: hours and memory to come."""

    files: tuple[Read, ...]
    pages: int
    passages: int
    sentences: int
    questions: int
    left_out: tuple[str, ...]
    takes: str
    ahead: Ahead | None = None


@dataclass(frozen=True)
class Looked:
    """What was seen of [[data.train]] and [[data.eval]], and of [[data.documents]]; None where a recipe has none."""

    rows: Seen | None
    documents: Papers | None


def look_at_data(recipe: Recipe | str | Path, *, rows: int = DRAWN_ROWS, sink: Sink | None = None) -> Looked:
    """Read, tokenize and look at the rows of a recipe; `rows` of them are taken apart token by token.

    Needs no GPU and no weights. What preparation left out or chose is emitted to `sink`. Raises the errors of
    `qlora.errors`.
    """
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import check_files
    from qlora.model import row_packing
    from qlora.model.base_folder import check_entries, check_tokenizer_config
    from qlora.model.chat_template import chosen
    from qlora.model.resolve import config_in, small_files
    from qlora.model.tokenizer_files import read_files
    from qlora.study import defaults, material, thinking
    from qlora.study.amount import Documents

    if not isinstance(recipe, Recipe):
        files.user_path(recipe, "the recipe")
        recipe = Recipe.from_file(Path(recipe).expanduser())
    shared = Sinks(sink) if sink is not None else Sinks()
    if not recipe.data.train and not recipe.data.documents:
        hint = 'add [[data.train]] with path = "rows.jsonl", or [[data.documents]] with path = "manuals"'
        raise RecipeError([Problem("recipe", "no training rows: there is no [[data.train]]", hint)])
    with Guarded("looking at the rows", "end other programs that hold memory"):
        open_length = not defaults.has_length(recipe)
        recipe, papers = material.read(recipe, open_length, shared)
        found = localize(recipe.data, shared)
        check_files(found.local)
        folder = small_files(recipe.model.base, recipe.model.revision, shared)
        if folder.is_dir():
            check_entries(folder)
        config = config_in(folder, recipe.model.base)
        check_tokenizer_config(folder)
        recipe = recipe.model_copy(update={"data": found.pinned})
        recipe = thinking.settled(row_packing.settled(recipe, config, shared), folder, shared)
        tokenizer = chosen(read_files(folder), recipe.model, recipe.model.base, shared)
        seen = rows_of(recipe, tokenizer, rows, shared) if recipe.data.train else None
        if papers is None:
            return Looked(seen, None)
        own_tokens = seen.train.tokens if seen is not None else 0
        lesson = _lesson(recipe, tokenizer, papers, shared)
        known = (Documents.of(lesson.passages, own_tokens), open_length)
        to_come = ahead(recipe, config, lesson.batches, known, shared)
        return Looked(seen, replace(papers_of(papers, lesson, config), ahead=to_come))


def _lesson(recipe: Recipe, tokenizer: TokenizerFiles, found: Material, sink: Sink) -> Lesson:
    from qlora.data.chat import ChatTokenizer
    from qlora.model.tokenizer import open_tokenizer
    from qlora.study.lesson import Lesson

    with tokenizer.placed() as folder:
        opened = open_tokenizer(folder, recipe.model.base)
    chat = ChatTokenizer(opened, recipe.data.loss_on, Sinks(), tokenizer.embedding_rows)
    return Lesson.of(found, recipe, chat, sink)


def papers_of(found: Material, lesson: Lesson, config: Any) -> Papers:
    """What was read of documents, and what a lesson makes of them; `config` is the base's config.json."""
    from qlora.model.meta_model import text_config

    recipe = lesson.recipe
    takes = lesson.room(text_config(config, recipe.model.base)[0], None).told()
    of = Counter(passage.document for passage in lesson.passages)
    documents = found.documents
    files_read = tuple(
        Read(one.path, one.pages, one.language, of[one.path], tuple(map(_said, one.left_out)))
        for one in documents.documents
    )
    sentences = sum(len(passage.sentences) for passage in lesson.passages)
    left_out = tuple(map(_said, documents.left_out))
    return Papers(files_read, documents.pages, len(lesson.passages), sentences, lesson.questions, left_out, takes)


def _said(part: LeftOut) -> str:
    return f"{part.where}: {part.reason}" + (f" ({part.count:,})" if part.count > 1 else "")


def rows_of(recipe: Recipe, tokenizer: TokenizerFiles, rows: int, sink: Sink) -> Seen:
    """The rows of a recipe's own sources, counted, `rows` of them taken apart."""
    from qlora.data.hub_rows import localize
    from qlora.data.loader import TrainOrder
    from qlora.data.prepare import prepare
    from qlora.data.xray.look import look
    from qlora.training.setup import prepare_rows

    with tempfile.TemporaryDirectory(prefix="qlora-rows-", ignore_cleanup_errors=True) as place:
        chat, prepared = prepare_rows(recipe, tokenizer, sink)
        if not all(report.by_source for report in prepared.reports):
            sink.emit(Notice("cache", "an older version tokenized these rows and counted less: they are read again"))
            seed = recipe.train.seed
            local = localize(recipe.data, Sinks()).local
            prepared = prepare(local, tokenizer.fingerprint, chat, seed, Path(place), Sinks())
        packs = TrainOrder(prepared.train, recipe.data, recipe.train.seed, 1).epoch_packs(0)
        return look(recipe.model.base, recipe.data, chat, prepared, packs, rows)
