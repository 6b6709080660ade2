"""A run's exam, asked again: of its adapter, of a merged folder, or of a GGUF file through llama.cpp.

Questions, passages and the tokenizer are those in the run's folder, and what was answered before by the same weights is
not asked again: where the base's answers are there, it is not loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import files, run_folder
from qlora.ask.opened import chat_of_adapter, tokenizer_of_adapter, tuned_model
from qlora.errors import DataError, ExportError, RunFolderError
from qlora.events import Examined, Notice, Sink, Sinks
from qlora.guarded import Guarded
from qlora.model.base_cache.places import mode_beside
from qlora.run_record import is_run
from qlora.stop import StopRequest
from qlora.study import exam, plain_text
from qlora.study.exam_questions import ExamQuestion, asked_before, language_of, load_passages, read_yours
from qlora.study.material import FOLDER
from qlora.study.records import key_of

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer
    from qlora.model.adapter_folder import Adapter, Provenance
    from qlora.model.tokenizer_files import TokenizerFiles
    from qlora.recipe.reading import Recipe
    from qlora.study.exam_asking import TeacherAsker
    from qlora.study.prompts import Frame
    from qlora.study.teacher import Teacher

GGUF_AT_ONCE = 64  # answers of one process: each loads the file
_CONFIG_KEYS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
_AN_EXPORT = "name what was exported from this run: a merged folder or a GGUF file"


@dataclass(frozen=True)
class _File:
    """A file of questions, as a recipe's table would name it."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)


def examine(
    run: str | Path,
    *,
    questions: str | Path | None = None,
    of: str | Path | None = None,
    sink: Sink | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """The figures of a run's exam (`study/exam_report.py` says which). `questions`: a file to be asked instead of the
    run's own questions. `of`: an export to be asked instead of the adapter. Without both, exam.json and exam.md are
    written anew.

    Raises RunFolderError for what is no run, or one without an exam, DataError for questions that are none, ExportError
    for an export that is none of this run.
    """
    shared = Sinks(sink) if sink is not None else Sinks()
    run_dir = files.user_path(run, "the run")
    if not is_run(run_dir):
        raise RunFolderError(f"{run_dir}: is no run's folder", "name one, such as runs/manuals")
    folder = run_dir / FOLDER
    if files.is_link(folder):
        raise RunFolderError(f"{folder}: is a link", "put the folder itself in its place")
    passages = load_passages(folder)
    asked = asked_before(folder, passages) if questions is None else _yours(questions, language_of(passages))
    export = None if of is None else _export(files.user_path(of, "`of`"))
    adapter_dir, _ = run_folder.adapter_of(run_dir)
    claim = run_folder.claim(run_dir, "resume")
    try:
        with (
            Guarded("the exam", "end other programs that hold memory"),
            _asker(_Run(adapter_dir, shared, stop or StopRequest()), export) as asker,
        ):
            run_recipe = run_folder.recipe_of(adapter_dir, Sinks())
            seed = 0 if run_recipe is None else run_recipe.train.seed
            told = exam.Exam(folder, passages, asked, seed)
            if questions is not None:
                plain_text.tell(asker.run.chat, (question.text for question in asked), "your questions", shared)
            if questions is None and export is None:
                return exam.after(told, asker, shared)
            figures, _ = exam.measure(told, asker, shared)
            shared.emit(Examined(figures))
            return figures
    finally:
        claim.release()


def _yours(questions: str | Path, language: str) -> list[ExamQuestion]:
    file = files.user_path(questions, "`questions`")
    if not file.is_file():
        raise DataError(f"`questions`: {file}: no such file", "name a JSONL, JSON or CSV file of questions and answers")
    return read_yours([_File(str(file))], language)


@dataclass
class _Run:
    """A run's model and tokenizer, each opened when it is needed."""

    adapter_dir: Path
    sink: Sinks
    stop: StopRequest

    @cached_property
    def recipe(self) -> Recipe:
        found = run_folder.recipe_of(self.adapter_dir, self.sink)
        if found is None:
            raise RunFolderError(
                f"{self.adapter_dir.parent}: has no recipe", "name a run's folder, such as runs/manuals"
            )
        return found

    @cached_property
    def adapter(self) -> Adapter:
        from qlora.model.adapter_folder import read_adapter

        return read_adapter(self.adapter_dir)

    @cached_property
    def origin(self) -> Provenance:
        from qlora.model.adapter_folder import provenance

        return provenance(self.adapter_dir, self.adapter.config)

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer that the run was trained with, with its template."""
        return tokenizer_of_adapter(self.adapter_dir, self.recipe, lambda: self.base, self.sink)

    @cached_property
    def chat(self) -> ChatTokenizer:
        return chat_of_adapter(self.adapter_dir, self.recipe, lambda: self.base, self.sink)

    @cached_property
    def base(self) -> Any:
        from qlora.export import adapter_base

        return adapter_base.open_base(self.adapter, self.origin, None, self.sink)

    @property
    def frame(self) -> Frame:
        return "chat" if self.chat.template is not None else "lines"

    @property
    def base_frame(self) -> Frame:
        """In which the base read better when the run asked it."""
        from qlora.study.probe import frame_of
        from qlora.study.study import PROBE_FILE

        found = frame_of(self.adapter_dir.parent / FOLDER / PROBE_FILE)
        return "lines" if found == "lines" else self.frame

    @property
    def base_id(self) -> str:
        """As the run itself names the weights of its base, held as they are."""
        identity = self.origin.identity
        quantization = self.origin.quantization.model_dump(mode="json")
        from qlora.study import thinking

        named = None if identity is None else identity.model_dump()
        return key_of(named, quantization, *thinking.identity(self.chat, self.recipe))

    @cached_property
    def teacher(self) -> Teacher:
        """The base with the adapter on it. Raises ExportError where it is another base than was trained on."""
        from qlora.study.teacher import Teacher
        from qlora.training.setup import pick_device

        device = pick_device()
        settings = (self.recipe.model.attention, device, mode_beside(self.recipe.memory))
        model = tuned_model(self.adapter_dir, self.origin, self.base, settings, self.sink)
        return Teacher(model, self.chat, device, self.sink, self.stop)

    def release(self) -> None:
        """Give back the memory of the model."""
        from qlora.device import release
        from qlora.model import emptied

        teacher = self.__dict__.pop("teacher", None)
        if teacher is not None:
            emptied.empty(teacher.model)
            release(teacher.device)


@dataclass
class _RunAsker:
    """The run's own model; see `exam.Asker`."""

    run: _Run
    frame: Frame
    base_frame: Frame
    base_id: str
    tuned_id: str
    at_once: int = 16

    def base(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._teacher.base(texts, max_new_tokens)

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._teacher.tuned(texts, max_new_tokens)

    def nats(self, texts: Sequence[str]) -> list[float]:
        return self._teacher.nats(texts)

    @property
    def _teacher(self) -> TeacherAsker:
        from qlora.study.exam_asking import TeacherAsker

        return TeacherAsker(self.run.teacher, self.frame, self.base_frame, self.base_id, self.tuned_id)


@dataclass
class _ExportAsker(_RunAsker):
    """An export in the place of the tuned model. How far it is from the base is not measured: `export.json` says how
    near it is to the tuned model."""

    answer: Callable[[Sequence[str], int], list[str]] = field(kw_only=True)

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        self.run.release()
        return self.answer(texts, max_new_tokens)

    def nats(self, texts: Sequence[str]) -> list[float]:
        return []


@contextmanager
def _asker(run: _Run, export: Path | None) -> Iterator[_RunAsker]:
    """Who is asked. What was loaded is given back behind the block."""
    from qlora.model.cpu_matmul import fast_matmul
    from qlora.study.run_exam import tuned_id
    from qlora.training.setup import pick_device

    who = (run.frame, run.base_frame, run.base_id, tuned_id(run.adapter_dir) if export is None else _sha256(export))
    with fast_matmul(pick_device()):
        try:
            if export is None:
                yield _RunAsker(run, *who)
            elif export.is_file():
                _check_gguf(run, export)
                yield _ExportAsker(run, *who, GGUF_AT_ONCE, answer=_by_llama(run, export))
            else:
                with _merged(run, export) as answer:
                    yield _ExportAsker(run, *who, answer=answer)
        finally:
            run.release()


def _export(path: Path) -> Path:
    """A GGUF file or a merged folder: what `path` means. Raises ExportError."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1 and not files.is_link(found[0]):
            return found[0]
        if (path / "config.json").is_file():
            return path
        if len(found) > 1:
            raise ExportError(f"`of`: {path}: holds {len(found)} GGUF files", f"name one of them, such as {found[0]}")
    raise ExportError(f"`of`: {path}: neither a GGUF file nor a folder with a merged model", _AN_EXPORT)


def _sha256(path: Path) -> str:
    """Hash of a file, or of a folder's weights and configuration."""
    whole = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"]):
        with files.open_to_read(file.resolve()) as content:
            while block := content.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


# --- a GGUF file ------------------------------------------------------------------------------------------------------


def _check_gguf(run: _Run, file: Path) -> None:
    """Raises ExportError for a file that llama.cpp cannot read, or that is of another model; says whose it may be."""
    from qlora.export.gguf import same_model
    from qlora.export.gguf.plan import Tokens

    tokenizer, name = run.chat.tokenizer, run.adapter_dir.parent.name
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in same_model.TEXTS]
    said = same_model.check(file, _llama(), run.base, Tokens(run.tokenizer, run.chat.template), ids)
    if said and name not in said:
        message = (
            f"{file.name} calls itself {said[:100]!r}, and this run is {name}: its shape and its tokens are the run's"
        )
        run.sink.emit(Notice("exam", message))


def _by_llama(run: _Run, file: Path) -> Callable[[Sequence[str], int], list[str]]:
    from qlora.export.llama_cpp import runtime
    from qlora.study.prompts import prompt_ids
    from qlora.study.thinking import without

    def answer(texts: Sequence[str], max_new_tokens: int) -> list[str]:
        run.stop.check()
        chat = run.chat
        ends = sorted(chat.end_token_ids)
        prompts = [prompt_ids(chat, run.frame, text) for text in texts]
        request = runtime.Request(prompts=prompts, max_new_tokens=max_new_tokens, more_ends=ends)
        with runtime.ask(_llama(), file, request) as answered:
            written = [str(chat.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in answered.written]
        return [text.split("\n")[0].strip() if run.frame == "lines" else without(text).strip() for text in written]

    return answer


def _llama() -> Any:
    from qlora.export.llama_cpp import runtime

    found = runtime.find_runtime()
    if found is None:
        raise ExportError("llama.cpp is not installed, and a GGUF file is asked through it", "pip install xllamacpp")
    return found


# --- a merged folder --------------------------------------------------------------------------------------------------


@contextmanager
def _merged(run: _Run, folder: Path) -> Iterator[Callable[[Sequence[str], int], list[str]]]:
    """A merged folder's answers; it is loaded at the first question. Raises ExportError for another model's."""
    from qlora.model import emptied, load
    from qlora.model.resolve import resolve
    from qlora.recipe.sections import QuantizationSection
    from qlora.study.teacher import Teacher
    from qlora.training.setup import pick_device

    merged = resolve(str(folder), "main", run.sink)
    here, trained = (model.config.get("text_config") or model.config for model in (merged, run.base))
    if any(here.get(key) != trained.get(key) for key in _CONFIG_KEYS):
        raise ExportError(f"{folder}: is another model than this run's base", _AN_EXPORT)
    loaded: list[Teacher] = []

    def answer(texts: Sequence[str], max_new_tokens: int) -> list[str]:
        if not loaded:
            device, whole = pick_device(), QuantizationSection(type="none")
            model = load.load_base(merged, whole, run.recipe.model.attention, device, run.sink)
            loaded.append(Teacher(model, run.chat, device, run.sink, run.stop))
        teacher = loaded[0]
        return [teacher.text(written) for written in teacher.greedy(run.frame, texts, max_new_tokens)]

    try:
        yield answer
    finally:
        for teacher in loaded:
            emptied.empty(teacher.model)
