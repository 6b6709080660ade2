"""Models measured on the same rows: base, adapter, merged folder and GGUF file in one table, with what is chance.

The rows are read as training reads them: formats, template and trained tokens are the run's. One model is in memory at
a time. Loss and token accuracy are of trained tokens; answers are greedy, end where training ends them, and are scored
as a run's exact match and an exam's "contains" are. What is made of them stands in
`ask/measured.py`.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files, run_folder
from qlora.ask.opened import HowToOpen, Named, TorchModel, chat_of_adapter, named, open_model
from qlora.errors import DataError, ExportError, TokenizerError
from qlora.events import Notice, Sink, Sinks
from qlora.guarded import Guarded
from qlora.run_record import is_run
from qlora.stop import StopRequest

if TYPE_CHECKING:
    from qlora.ask.likelihood import Asked
    from qlora.ask.measured import Measured
    from qlora.data.chat import ChatTokenizer
    from qlora.data.token_cache import PreparedSplit
    from qlora.recipe.reading import Recipe
    from qlora.recipe.sections import DataSection
    from qlora.training.questions import Question

MOST_MODELS = 8
FEW_ROWS = 20  # below, an interval holds the mean less often than it says
LONGEST_ANSWER = 512  # tokens
_NAME_ONE = "name first the run, adapter or model that it was made of"


@dataclass(frozen=True)
class HowToEvaluate:
    """What is measured.

    base        the base of each adapter too, held as in training
    rows        at most so many, spread evenly over all
    answers     so many of them are answered
    max_length  of a row in tokens; None: as the run was trained, else 2048
    base_model  where an adapter's base lies, if not where the adapter says
    """

    base: bool = True
    rows: int = 500
    answers: int = 50
    max_length: int | None = None
    base_model: str | Path | None = None


def evaluate(
    models: Sequence[str | Path],
    data: str | Path,
    *,
    how: HowToEvaluate | None = None,
    sink: Sink | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Figures of `models` (runs, adapters, merged folders, GGUF files) on the rows of `data`, a path as [[data.eval]]
    has it.

    Raises ExportError for what is no model, DataError for rows that are none, TokenizerError where a model would read
    them as other tokens than the first one.
    """
    from qlora.ask.measured import figures_of

    shared, how = Sinks(sink) if sink is not None else Sinks(), how or HowToEvaluate()
    if not 1 <= len(models) <= MOST_MODELS:
        raise ExportError(f"{len(models)} models are named", f"name 1 to {MOST_MODELS}, and then the rows")
    found = [named(model) for model in models]
    with Guarded("evaluating", "end other programs that hold memory, or name fewer models"):
        asked = _asked(found, data, how, shared, stop or StopRequest())
        measured: list[Measured] = []
        lines = _Lines()
        for source in found:
            measured += _measured(source, asked, how, shared, lines)
    return figures_of(measured, asked)


# --- the rows -------------------------------------------------------------------------------------------------------


def _asked(found: Sequence[Named], data: str | Path, how: HowToEvaluate, sink: Sinks, stop: StopRequest) -> Asked:
    """The rows as the first model reads them; every other one must read them so too."""
    from qlora.ask.likelihood import Asked
    from qlora.data.hub_rows import localize
    from qlora.data.prepare import check_files
    from qlora.training.questions import answer_tokens, questions_of

    recipe = _recipe_of(found)
    section = _section(data, recipe, how)
    local = localize(section, sink).local
    check_files(local)
    chats = [(source, _chat(source, local.loss_on, how, sink)) for source in _with_tokenizers(found)]
    chat = chats[0][1]
    split = _rows(local, chat, how.rows, sink)
    for source, other in chats[1:]:
        _refuse_other_rows(source, split, _rows(local, other, how.rows, Sinks()))
    answerable = [row for row in range(len(split.lengths)) if split.prompt(row) is not None]
    answered = _spread(answerable, how.answers)
    questions = questions_of(_chosen(split, answered), chat, len(answered))
    limit = max(1, min(answer_tokens(questions, chat), LONGEST_ANSWER))
    fitting = _fitting(questions, limit, [source for source, _ in chats], how, sink)
    answered, questions = [answered[number] for number in fitting], [questions[number] for number in fitting]
    if len(split.lengths) < FEW_ROWS:
        message = "rows are few: intervals of so few hold the true value less often than 95 times of 100"
        sink.emit(Notice("rows", message, len(split.lengths)))
    return Asked(split, chat, local.max_length, answered, questions, limit, sink, stop.check)


def _fitting(
    questions: Sequence[Question], limit: int, sources: Sequence[Named], how: HowToEvaluate, sink: Sinks
) -> list[int]:
    """Numbers of the questions that every model has room for with an answer of `limit` tokens; the others are said.

    Exact match allows each answer the same length, however long another question is.
    """
    context = min((_context(source, how, sink) for source in sources), default=0) if questions else 0
    fitting = [number for number, one in enumerate(questions) if len(one.prompt_ids) + limit <= context]
    if left_out := len(questions) - len(fitting):
        message = f"not answered are questions that with an answer of {limit:,} tokens exceed a context of {context:,}"
        sink.emit(Notice("answers", message, left_out))
    return fitting


def _section(data: str | Path, recipe: Recipe | None, how: HowToEvaluate) -> DataSection:
    """The rows of a path as a recipe's table would name them; those that the run's recipe names are read as there."""
    from qlora.recipe.sections import DataSection, SourceSection

    text = str(data)
    path = text if text.startswith("hub:") else str(files.user_path(data, "the rows"))
    section = DataSection() if recipe is None else recipe.data
    known = {source.path: source for source in (*section.train, *section.eval)}
    source = known.get(path, SourceSection(path=path))
    changes = {
        "train": (source.model_copy(update={"weight": 1.0}),),
        "eval": (),
        "documents": (),
        "eval_fraction": 0.0,
        "packing": False,
        "max_length": how.max_length or section.max_length,
    }
    return section.model_copy(update=changes)


def _rows(section: DataSection, chat: ChatTokenizer, most: int, sink: Sink) -> PreparedSplit:
    """At most so many of the rows that have a trained token, spread evenly over all. Raises DataError without one."""
    from qlora.data.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="qlora-rows-") as place:
        split = prepare(section, "", chat, 0, Path(place), sink).train
        usable = [row for row, trained in enumerate(split.trained) if trained]
        if not usable:
            raise DataError(f"{section.train[0].path}: no row has a trained token", "name rows with answers in them")
        kept = _spread(usable, most)
        if len(kept) < len(usable):
            message = f"measured are {len(kept):,} rows, spread evenly over all {len(usable):,}"
            sink.emit(Notice("rows", message, len(kept)))
        return _chosen(split, kept)


def _spread(rows: Sequence[int], most: int) -> list[int]:
    if len(rows) <= most:
        return list(rows)
    return [rows[at * len(rows) // most] for at in range(most)]


def _chosen(split: PreparedSplit, rows: Sequence[int]) -> PreparedSplit:
    """Some rows of a split, in memory."""
    from qlora.data.token_cache import PreparedSplit

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    prompts = of(split.prompts) if split.prompts else ()
    return PreparedSplit(
        of(split.rows), of(split.lengths), of(split.trained), of(split.wheres), of(split.sources), prompts
    )


def _refuse_other_rows(source: Named, ours: PreparedSplit, theirs: PreparedSplit) -> None:
    same = len(ours.lengths) == len(theirs.lengths) and all(
        list(one.input_ids) == list(other.input_ids) and list(one.loss_weights) == list(other.loss_weights)
        for one, other in zip(ours.rows, theirs.rows, strict=True)
    )
    if not same:
        what = f"{source.name}: has another tokenizer or chat template than the first model: the rows are other tokens"
        raise TokenizerError(what, "evaluate it by itself: losses of other tokens cannot be compared")


# --- the models -----------------------------------------------------------------------------------------------------


def _recipe_of(found: Sequence[Named]) -> Recipe | None:
    """The recipe of the first run that is named, or in whose exports one of the files lies."""
    for folder in (folder for source in found for folder in _above(source)):
        if is_run(folder):
            return run_folder.recipe_of(folder / "adapter", Sinks())
    return None


def _above(source: Named) -> Iterator[Path]:
    """The folders in which a model on the disk may belong to a run: run/adapter, run/export/hf, run/export/q/file."""
    if not isinstance(source.place, str):
        yield from source.place.parents[: {"adapter": 1, "model": 2, "gguf": 3}[source.kind]]


def _with_tokenizers(found: Sequence[Named]) -> list[Named]:
    """Those that bring a tokenizer; of GGUF files alone, the run whose exports one lies in. Raises ExportError."""
    bringing = [source for source in found if source.kind != "gguf"]
    if bringing:
        return bringing
    for folder in (folder for source in found for folder in _above(source)):
        if is_run(folder) and (folder / "adapter").is_dir():
            return [named(folder)]
    raise ExportError(f"{found[0].place}: a GGUF file alone has no tokenizer to read rows with", _NAME_ONE)


def _chat(source: Named, loss_on: str, how: HowToEvaluate, sink: Sink) -> ChatTokenizer:
    """Tokenizer and template, without a weight being read."""
    from qlora.data.chat import ChatTokenizer
    from qlora.export import adapter_base
    from qlora.model import chat_template, tokenizer_files
    from qlora.model.adapter_folder import provenance, read_adapter
    from qlora.model.resolve import resolve
    from qlora.model.tokenizer import open_tokenizer
    from qlora.recipe.sections import ModelSection

    if source.kind == "adapter":
        folder = Path(source.place)
        adapter = read_adapter(folder)
        origin = provenance(folder, adapter.config)
        recipe = run_folder.recipe_of(folder, Sinks())
        return chat_of_adapter(
            folder, recipe, lambda: adapter_base.open_base(adapter, origin, how.base_model, sink), sink
        )
    base = resolve(str(source.place), "main", sink)
    read = tokenizer_files.read_files(base.path)
    taken = chat_template.chosen(read, ModelSection(base=str(source.place)), base.name, Sinks())
    with taken.placed() as place:
        tokenizer = open_tokenizer(place, base.name)
    return ChatTokenizer(tokenizer, loss_on, sink, taken.embedding_rows)  # type: ignore[arg-type]


def _context(source: Named, how: HowToEvaluate, sink: Sink) -> float:
    """Tokens that the model takes by its config.json; infinite where that has no limit, as of a recurrent one."""
    from qlora.export import adapter_base
    from qlora.model.adapter_folder import provenance, read_adapter
    from qlora.model.meta_model import text_config
    from qlora.model.resolve import resolve

    if source.kind == "adapter":
        adapter = read_adapter(Path(source.place))
        base = adapter_base.open_base(adapter, provenance(adapter.folder, adapter.config), how.base_model, sink)
    else:
        base = resolve(str(source.place), "main", sink)
    known = getattr(text_config(base.config, base.name)[0], "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else math.inf


def _measured(source: Named, asked: Asked, how: HowToEvaluate, sink: Sink, lines: _Lines) -> Iterator[Measured]:
    """The lines of one model: of an adapter, its base before it."""
    from qlora.ask.likelihood import by_llama, by_torch
    from qlora.ask.llama import LlamaModel
    from qlora.ask.measured import Measured

    name = lines.name_of(source)
    if source.kind == "gguf":
        yield Measured(name, "gguf", "llama.cpp", *by_llama(Path(source.place), asked))
        return
    with open_model(source, HowToOpen(base_model=how.base_model, context=asked.max_length), sink) as opened:
        assert not isinstance(opened, LlamaModel)
        longest = max(asked.split.lengths)
        if longest > opened.context:
            what = f"{name}: takes {opened.context:,} tokens, and a row has {longest:,}"
            raise DataError(what, f"say a `max_length` of {opened.context:,}")
        if source.kind == "adapter" and how.base and (base := lines.name_of_base(opened)) is not None:
            with opened.adapters_off():
                yield Measured(base, "base", "transformers", *by_torch(opened.model, asked, opened.device, base))
        made = by_torch(opened.model, asked, opened.device, name)
        yield Measured(name, source.kind, "transformers", *made)


class _Lines:
    """What the lines of a table are called, each once. A base that several adapters share has one line."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._bases: set[tuple[str, ...]] = set()

    def name_of(self, source: Named) -> str:
        """A merged folder in a run's exports by both names; others by their own."""
        place = Path(source.place)
        return self._free(f"{place.parent.parent.name}/{place.name}" if place.parent.name == "export" else source.name)

    def name_of_base(self, opened: TorchModel) -> str | None:
        """Of an adapter's base; None where it has a line. Names do not tell bases apart, two folders may both be called
        `model`: their bytes and how they are held do."""
        assert opened.origin is not None, "only an adapter has a base beside it"
        known, held = opened.model.get_base_model().base_identity, opened.origin.quantization
        content = known.content or os.path.realpath(opened.base.path)
        base = (known.config, known.sampled, content, held.model_dump_json())
        if base in self._bases:
            return None
        self._bases.add(base)
        return self._free(f"base ({Path(opened.base.name).name}, {'16 bit' if held.type == 'none' else held.type})")

    def _free(self, name: str) -> str:
        """With a number where that is taken."""
        number = next(number for number in itertools.count(1) if _numbered(name, number) not in self._taken)
        self._taken.add(_numbered(name, number))
        return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


# --- a harness ------------------------------------------------------------------------------------------------------


def by_harness(
    models: Sequence[str | Path],
    tasks: str,
    *,
    limit: int | None = None,
    how: HowToEvaluate | None = None,
    sink: Sink | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds of each model, and of an adapter's base: figures by model and task.

    `tasks` are names of the harness' own, or YAML files, with commas between them. Raises ExportError where it is not
    installed, for a task that it cannot do, and for a GGUF file, which it does not compute here.
    """
    from qlora.ask import harness
    from qlora.ask.llama import LlamaModel

    shared, how = Sinks(sink) if sink is not None else Sinks(), how or HowToEvaluate()
    harness.check_installed()
    wanted, found = harness.split_tasks(tasks), [named(model) for model in models]
    if files_of := [source for source in found if source.kind == "gguf"]:
        what = f"{files_of[0].place}: the harness computes with transformers, and this is a GGUF file"
        raise ExportError(what, "name the merged folder or the run that it was made of")
    figures: dict[str, Any] = {}
    lines = _Lines()
    with Guarded("evaluating", "end other programs that hold memory, or name fewer models"):
        for source in found:
            context = how.max_length or HowToOpen().context
            with open_model(source, HowToOpen(base_model=how.base_model, context=context), shared) as opened:
                assert not isinstance(opened, LlamaModel), "GGUF files are refused above"
                if source.kind == "adapter" and how.base and (base := lines.name_of_base(opened)) is not None:
                    with opened.adapters_off():
                        figures[base] = harness.run(opened, wanted, limit, shared)
                figures[lines.name_of(source)] = harness.run(opened, wanted, limit, shared)
    return figures
