"""Which format the columns of a file make, under the format's own names or those of other exports.

Where one column can be the question and one the answer, they are read as such, and the report of the file names them.
Where several can, or none, the error carries the line of the recipe that says which: with the file's own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from qlora.data.role_words import ANSWER_WORDS, QUESTION_WORDS, plain_word, role_of, said_by
from qlora.data.row_json import RowError, is_blank, kind_of, load_json

# Columns that tell each format, in the order in which they are looked for.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
TURN_COLUMNS = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "dialogues", "chat", "turns", "contents"),
    *("chat_messages", "message_list", "chat_history"),
)
# What a question is asked of: dropped, the question would be another.
_GIVEN = ("context", "passage", "document", "article", "paragraph")
# Better guesses than the order of the file, for the line that the user is to write.
_LIKELY_QUESTIONS = (*QUESTION_WORDS, *_GIVEN, "title", "en", "sentence", "premise")
_LIKELY_ANSWERS = (
    *ANSWER_WORDS,
    *("answers", "summary", "highlights", "chosen", "label", "code", "body", "content", "text"),
)
_ROLE_KEYS = ("role", "from", "sender", "speaker", "author", "type")
_LIKELY_TEXTS = ("text", "content", "body", "code", "raw_content", "markdown", "chat")
# Columns that are text and nothing to learn.
_NO_CONTENT = re.compile(
    r"(^|_)(id|ids|uuid|uid|url|lang|language|source|dataset|category|type|split|model|date)$|^system"
)
_MAX_NAMES = 10
_MAX_LOOKED_AT = 1_000  # columns: a table may have 10,000
_COMPARED = 'to learn from both, objective = "dpo" under [train]'
_HINT_OF_MESSAGES = 'join the turns of each conversation to one row: {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True)
class Reading:
    """A file's format, and its columns by the format's own names where they have others."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        renamed = ", ".join(f"{theirs} as {own}" for own, theirs in self.columns.items())
        return f"{self.format} ({renamed})" if renamed else self.format


def detect(row: Mapping[str, Any]) -> Reading:
    """How rows like this one are read. Raises RowError with what was found and the line of the recipe that mends it."""
    there = {name for name, value in row.items() if value is not None}
    check_preference(row)
    for name, needed in FORMAT_COLUMNS.items():
        if set(needed) <= there and not (name == "text" and (what := _piece(row))):
            return Reading(name)
    if reading := _by_other_names(row):
        return reading
    what = _piece(row) or f"no known format has these columns: {column_names(there)} (known are {_known()})"
    raise RowError(what, file_hint=suggestion(row))


def _known() -> str:
    return "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in FORMAT_COLUMNS.items())


def column_names(columns: Collection[str]) -> str:
    """Names of columns in their order, the first few of many."""
    first = [name[:40] for name in sorted(columns)[:_MAX_NAMES]]
    more = f" and {len(columns) - _MAX_NAMES:,} more" if len(columns) > _MAX_NAMES else ""
    return ", ".join(first) + more or "none"


def _by_other_names(row: Mapping[str, Any]) -> Reading | None:
    """The reading that is the only one by the names of the columns; None where there is none, or more than one."""
    found = _columns_of(row, TURN_COLUMNS)
    if len(found) == 1 and is_turns(row[found[0]]):
        return Reading("messages", {"messages": found[0]})
    questions, answers = _columns_of(row, QUESTION_WORDS), _columns_of(row, ANSWER_WORDS)
    words = {plain_word(name) for name in questions}
    if len(answers) != 1 or found:
        return None
    given = [name for name in row if plain_word(name) in _GIVEN]
    if words <= {"instruction", "input"} and "instruction" in words and len(given) + ("input" in words) <= 1:
        own = dict.fromkeys(("input",) if given else (), "".join(given))
        own |= {plain_word(name): name for name in questions} | {"output": answers[0]}
        return Reading("alpaca", {name: theirs for name, theirs in own.items() if name != theirs})
    if len(questions) != 1 or given or not _is_said(row[questions[0]]):
        return None
    own = {"prompt": questions[0], "completion": answers[0]}
    return Reading("prompt-completion", {name: theirs for name, theirs in own.items() if name != theirs})


def _columns_of(row: Mapping[str, Any], words: Collection[str]) -> list[str]:
    return [name for name, value in row.items() if plain_word(name) in words and value is not None]


def _is_said(value: Any) -> bool:
    wrapped = value.get("messages") if isinstance(value, Mapping) else None
    return isinstance(lone_text(value), str) or is_turns(value) or is_turns(wrapped)


def lone_text(value: Any) -> Any:
    """The text of an object that has nothing else (LangSmith's {"input": …}); any other value as it is."""
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(text := next(iter(value.values())), str):
        return text
    return value


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, or the JSON text of one that has roles and contents."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[") or not ({"role", "from"} & set(re.findall(r'"(\w+)"', value[:2_000]))):
            return False
        try:
            value = load_json(value.strip())
        except RowError:
            return False
        return is_turns(value) and bool({"role", "from"} & set(value[0])) and bool({"content", "value"} & set(value[0]))
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return False
    return any(role_of(value[0].get(key)) for key in _ROLE_KEYS) or _names_its_speakers(value[0])


def _names_its_speakers(turn: Mapping[str, Any]) -> bool:
    by_role = {role_of(key) for key in turn} & {"user", "assistant"}
    return bool(by_role) or {"user", "assistant"} <= set(map(said_by, turn))


def _is_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _piece(row: Mapping[str, Any]) -> str:
    """What a row is that is only a piece of a conversation, or no text at all; "" for any other."""
    names = {plain_word(name) for name in row if not is_blank(row[name])}
    if "input_ids" in names:
        return "these rows are token ids of another tokenizer (input_ids), not text"
    if any(role_of(row.get(key)) for key in ("role", "from", "sender")) and names & {"content", "value", "text"}:
        return "each row is one message, not a conversation"
    if isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]:
        return "each row is a tree of messages (prompt.replies), of which no one path is the conversation"
    return ""


def check_preference(row: Mapping[str, Any]) -> None:
    """Raise RowError for rows of a better and a worse answer; the line of the recipe trains the better one."""
    names = {plain_word(name): name for name, value in row.items() if not is_blank(value)}
    for better, worse in preferences_of(names):
        chosen = row[better]
        what = f"these are preference rows (columns {better} and {worse}), from which sft does not learn"
        turns = isinstance(chosen, list) and is_turns(chosen) and len(chosen) > 1
        question = next((names[word] for word in (*QUESTION_WORDS, *TURN_COLUMNS) if word in names), None)
        if turns and role_of(chosen[0].get("role") or chosen[0].get("from")) != "assistant":
            raise RowError(what, f"{_COMPARED}; to train the better answers: {_line('messages', messages=better)}")
        if question is not None:
            line = _line("prompt-completion", prompt=question, completion=better)
            raise RowError(what, f"{_COMPARED}; to train the better answers: {line}")
        raise RowError(
            what, f"write the better answers, with their questions, into a file of their own, without {worse}"
        )


def preferences_of(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Columns of a better and a worse answer, of the names by their plain words."""
    for better, worse in (("chosen", "rejected"), ("preferred", "non_preferred"), ("winner", "loser")):
        for word, name in names.items():
            other = word.replace(better, worse)
            if other != word and other in names and not word.startswith(("score", "rating")) and "score" not in word:
                yield name, names[other]


def suggestion(row: Mapping[str, Any]) -> str:
    """The line of the recipe by which a row of these columns could be read, with its own names in it."""
    if piece := _piece(row):
        if "input_ids" in piece:
            return "give the texts: every base has ids of its own"
        alone = ', or set format = "text" to train each text alone' if isinstance(row.get("text"), str) else ""
        return _HINT_OF_MESSAGES + alone
    values = [(name, row[name]) for name in list(row)[:_MAX_LOOKED_AT] if not is_blank(row[name])]
    if turns := next((name for name, value in values if is_turns(value)), None):
        return f"name the column of the turns: {_line('messages', messages=turns)}"
    texts = [name for name, value in values if isinstance(value, str) and not _NO_CONTENT.search(plain_word(name))]
    lists = [name for name, value in values if isinstance(value, list | tuple | Mapping)]
    question = _likely(texts, _LIKELY_QUESTIONS)
    if question is None and (text := _likely(texts, _LIKELY_TEXTS)):
        return f"name the column of the text: {_line('text', text=text)}"
    question = question or next(iter(texts), None)
    rest = [name for name in texts if name != question]
    if not _likely(rest, _LIKELY_ANSWERS) and (other := _likely(lists, _LIKELY_ANSWERS)):
        return f"{other} is {kind_of(row[other])}: write the text of the answer into a column of its own"
    answer = _likely(rest, _LIKELY_ANSWERS) or next(iter(rest), None)
    if question is None and len(lists) == 1 and _is_objects(row[rows := lists[0]]):
        return f"if the rows are the objects in {rows}, write that list alone as a .json file"
    if question is None:
        return f"no column of it is a text or a list of turns; {_HINT_OF_MESSAGES}"
    if answer is None:
        return f"name the column of the text: {_line('text', text=question)}"
    given = [name for name in _columns_of(row, _GIVEN) if name not in (question, answer)]
    if plain_word(question) == "instruction" or given:
        also = {"input": given[0]} if given else {}
        return f"say which columns are meant: {_line('alpaca', instruction=question, **also, output=answer)}"
    return f"say which columns are meant: {_line('prompt-completion', prompt=question, completion=answer)}"


def _likely(names: list[str], words: tuple[str, ...]) -> str | None:
    found = [name for name in names if plain_word(name) in words]
    return min(found, key=lambda name: words.index(plain_word(name)), default=None)


def _line(format: str, **columns: str) -> str:
    """The lines of the recipe for a format whose columns have other names."""
    renamed = {own: theirs for own, theirs in columns.items() if own != theirs}
    return f'format = "{format}"' + (f", {_columns(renamed)}" if renamed else "")


def nearest_columns(columns: Mapping[str, str], there: Sequence[str]) -> str:
    """The line `columns` of a recipe again, with the file's own names where it names none of these."""
    nearest = {own: next(iter(get_close_matches(theirs, there, 1, 0.0)), theirs) for own, theirs in columns.items()}
    return _columns({own: theirs if theirs in there else nearest[own] for own, theirs in columns.items()})


def _columns(columns: Mapping[str, str]) -> str:
    pairs = ", ".join(f"{own} = {json.dumps(theirs, ensure_ascii=False)}" for own, theirs in columns.items())
    return f"columns = {{ {pairs} }}"


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`columns` gives the row's column by the format's own name; a column of that name stays, under another."""
    named = {own: row[theirs] for own, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    hidden = {f"{own} (replaced by {columns[own]})": row[own] for own in named if own in row and own not in taken}
    kept = {key: value for key, value in row.items() if key not in taken and key not in named}
    return {**kept, **named, **hidden}
