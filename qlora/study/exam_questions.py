"""The questions of an exam: the study's own (exam.jsonl), the user's, and those that no document answers.

What stands in a run's folder is read as if a stranger had written it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files as resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from qlora import disk, files, foreign_json, foreign_toml
from qlora.data.column_words import column_names
from qlora.data.documents.chunks import Passage
from qlora.data.formats import to_conversation
from qlora.data.row_json import RowError
from qlora.data.sources import read_rows
from qlora.errors import DataError, RunFolderError
from qlora.recipe.sections import SourceSection
from qlora.study import words
from qlora.study.records import Candidate, key_of

if TYPE_CHECKING:
    from qlora.study.split import Split

EXAM_FILE = "exam.jsonl"
YOURS_FILE = "exam_yours.jsonl"  # the user's questions as they were when the run began
PASSAGES_FILE = "chunks.jsonl"
# What a question is of: asked in other words of a studied fact, of a sentence left out, the user's, of no document.
Part = Literal["words", "left_out", "yours", "unanswerable"]
UNANSWERABLE = 20
MAX_YOURS = 100_000
MAX_TEXT = 20_000  # characters of a question or an answer of the user's
_MAX_BYTES = 1 << 30
_MAX_LINE = 1 << 20
_ANEW = "take the file from a copy of the run, or study anew"
T = TypeVar("T")


@dataclass(frozen=True)
class ExamQuestion:
    """A question with the answers that are right (none where it cannot be answered), and its passage where it has one
    (Passage.key)."""

    key: str
    part: Part
    text: str
    answers: tuple[str, ...]
    language: str
    passage: str | None = None


class OwnQuestions(Protocol):
    """An `[[exam.questions]]` table: a file of the user's, its path absolute by now."""

    @property
    def path(self) -> str: ...

    @property
    def columns(self) -> Mapping[str, str]: ...


# --- of the study -----------------------------------------------------------------------------------------------------


def save(folder: Path, split: Split) -> None:
    """Write exam.jsonl: the questions in other words, and those about what was left out."""
    lines = [_question("words", candidate) for candidate in split.exam]
    lines += [_question("left_out", candidate) for candidate in split.left_out]
    _write(folder / EXAM_FILE, [asdict(line) for line in lines])


def load(folder: Path) -> list[ExamQuestion]:
    """The questions of exam.jsonl. Raises RunFolderError where there is none, and for what is no question, by line."""
    return _load(folder / EXAM_FILE, ("words", "left_out"))


def save_yours(folder: Path, questions: Sequence[ExamQuestion]) -> None:
    """Write the user's own of `questions`, where there are any: a run is examined again by its folder alone."""
    own = [asdict(question) for question in questions if question.part == "yours"]
    if own:
        _write(folder / YOURS_FILE, own)


def load_yours(folder: Path) -> list[ExamQuestion]:
    """What `save_yours` has written; none where it did not. Raises RunFolderError for what is no question."""
    file = folder / YOURS_FILE
    return _load(file, ("yours",)) if file.exists() or files.is_link(file) else []


def _load(file: Path, parts: tuple[Part, ...]) -> list[ExamQuestion]:
    def checked(value: Any, where: str) -> ExamQuestion:
        found = foreign_json.checked_dataclass(ExamQuestion, _with_tuple(value, "answers"), where)
        if found.part not in parts or not found.text.strip() or not any(map(str.strip, found.answers)):
            raise foreign_json.ForeignFileError(f"{where}: no question with its answer")
        return found

    return _read(file, checked)


def save_passages(folder: Path, passages: Sequence[Passage]) -> None:
    """Write chunks.jsonl: each passage, by its key."""
    _write(folder / PASSAGES_FILE, [{"key": passage.key, **asdict(passage)} for passage in passages])


def load_passages(folder: Path) -> list[Passage]:
    """The passages of chunks.jsonl. Raises RunFolderError as `load` does."""

    def checked(value: Any, where: str) -> Passage:
        return foreign_json.checked_dataclass(Passage, _with_tuple(value, "headings", "sentences"), where)

    return _read(folder / PASSAGES_FILE, checked)


def _question(part: Part, candidate: Candidate) -> ExamQuestion:
    asked, passage = candidate.question, candidate.passage
    return ExamQuestion(asked.key, part, asked.text, (candidate.answer.text,), passage.language, passage.key)


def _write(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    disk.write_atomic(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read(file: Path, checked: Callable[[Any, str], T]) -> list[T]:
    if not file.exists():
        raise RunFolderError(
            f"{file}: is not there", "this run has no exam: it learnt no documents, or was not finished"
        )
    found: list[T] = []
    try:
        with files.open_to_read(file, _MAX_BYTES) as lines:
            while line := lines.readline(_MAX_LINE + 1):
                where = f"{file}:{len(found) + 1}"
                if len(line) > _MAX_LINE:
                    raise foreign_json.ForeignFileError(f"{where}: is longer than {_MAX_LINE:,} bytes")
                found.append(checked(foreign_json.parse_object(line, where), where))
    except (foreign_json.ForeignFileError, files.UnsafePathError) as error:
        raise RunFolderError(str(error), _ANEW) from error
    except OSError as error:
        raise RunFolderError(f"{file}: cannot be read ({error.strerror or error})", _ANEW) from error
    return found


def _with_tuple(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """JSON has no tuples."""
    return {name: tuple(item) if name in names and isinstance(item, list) else item for name, item in value.items()}


# --- the user's -------------------------------------------------------------------------------------------------------


def read_yours(sources: Sequence[OwnQuestions], language: str) -> list[ExamQuestion]:
    """The user's questions, of rows with `question` and `answer` (or `answers`, also as SQuAD has them), or of any
    format of training rows.

    Raises DataError for a file that cannot be read, a row without both, and more than MAX_YOURS rows.
    """
    found: list[ExamQuestion] = []
    for source in sources:
        section = SourceSection(path=source.path, columns=dict(source.columns))
        rows = list(islice(read_rows(section), MAX_YOURS + 1))
        if len(rows) > MAX_YOURS:
            raise DataError(f"{source.path}: more than {MAX_YOURS:,} questions are too many for an exam", "give fewer")
        for row in rows:
            try:
                if isinstance(row.row, RowError):
                    raise row.row
                text, answers = _asked(row.row)
            except RowError as error:
                hint = "each row needs a question and its answer: columns `question` and `answer` (or name yours)"
                raise DataError(f"{row.where}: {error}", hint) from error
            key = key_of("yours", text, answers)
            found.append(ExamQuestion(key, "yours", text, answers, language))
    return list({question.key: question for question in found}.values())


def _asked(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Question and right answers of a row. Raises RowError."""
    if isinstance(row.get("question"), str) and ("answer" in row or "answers" in row):
        text, given = row["question"], row.get("answers", row.get("answer"))
        if isinstance(given, dict) and isinstance(given.get("text"), list):  # SQuAD's, of several people
            given = list(dict.fromkeys(map(str, given["text"])))
        answers = given if isinstance(given, list) else [given]
    else:
        kind = next((kind for kind, columns in _ASKED.items() if all(name in row for name in columns)), None)
        if kind is None:
            raise RowError(f"no question and answer; this row has: {column_names(list(row))}")
        messages = to_conversation(row, kind).messages
        text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        answers = [messages[-1]["content"]] if messages and messages[-1]["role"] == "assistant" else []
    plain = [str(answer) for answer in answers if isinstance(answer, str | int | float) and str(answer).strip()]
    if not text.strip() or not plain or len(plain) != len(answers):
        raise RowError("the question or its answer is empty, or no text")
    if max(len(text), *map(len, plain)) > MAX_TEXT:
        raise RowError(f"a question or an answer of more than {MAX_TEXT:,} characters")
    return text.strip(), tuple(plain)


# --- of no document ---------------------------------------------------------------------------------------------------


def unanswerable(passages: Sequence[Passage], language: str) -> list[ExamQuestion]:
    """UNANSWERABLE questions about things that do not exist, by names that stand in none of the passages."""
    table = _table()
    texts = table[_shipped(language)]["unanswerable"]
    used = [name for name in table["names"] if not any(name.casefold() in p.text.casefold() for p in passages)]
    asked = [text.replace("{name}", name) for name in used for text in texts][:UNANSWERABLE]
    return [ExamQuestion(key_of("unanswerable", text), "unanswerable", text, (), language) for text in asked]


def neutral_prompts() -> list[str]:
    """100 prompts on other things, in five languages."""
    return [prompt for language in words.LANGUAGES for prompt in _table()[language]["neutral"]]


def all_questions(folder: Path, yours: Sequence[OwnQuestions], passages: Sequence[Passage]) -> list[ExamQuestion]:
    """The user's questions first, then the study's, then those that cannot be answered."""
    language = language_of(passages)
    return [*read_yours(yours, language), *load(folder), *unanswerable(passages, language)]


def asked_before(folder: Path, passages: Sequence[Passage]) -> list[ExamQuestion]:
    """The same questions again, from a run's folder alone. Raises RunFolderError as `load` does."""
    return [*load_yours(folder), *load(folder), *unanswerable(passages, language_of(passages))]


def language_of(passages: Sequence[Passage]) -> str:
    """The language of most passages; English for none."""
    counted: dict[str, int] = {}
    for passage in passages:
        counted[passage.language] = counted.get(passage.language, 0) + 1
    return max(counted, key=lambda language: (counted[language], language), default="en")


def _shipped(language: str) -> str:
    return words.words_of(language).language


@cache
def _table() -> dict[str, Any]:
    return foreign_toml.parse((resources("qlora.study") / "exam.toml").read_text(encoding="utf-8"))


_ASKED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
