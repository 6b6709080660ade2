"""Rows of preference: a question with a better and a worse answer, or with one answer and whether it is a good one.

Both are read as rows of the other formats that give the answer in question, so that every word of a column, a turn or a
system prompt that is known there is known here. Of an answer to be compared, what comes before it is context: earlier
answers are not trained. Where `chosen` and `rejected` are whole conversations, the turns that both share are that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.data.calls import Message
from qlora.data.column_words import TURN_COLUMNS, column_names, detect, is_turns, preferences_of, renamed
from qlora.data.formats import Conversation, to_conversation
from qlora.data.marks import ALL_RATINGS, is_rated_good
from qlora.data.role_words import QUESTION_WORDS, plain_word, role_of
from qlora.data.row_json import RowError, is_blank, object_of, parsed

Row = Mapping[str, Any]
_COLUMNS = 'name them: columns = { chosen = "…", rejected = "…" }'
_PAIR = 'give the question a column: {"prompt": …, "chosen": …, "rejected": …}'


@dataclass(frozen=True)
class Judged(Conversation):
    """`messages` end with the better answer, or with the only one; `worse` with the other one of a pair. `sign`: 1 of a
    better or a good answer, -1 of a bad one."""

    worse: tuple[Message, ...] = ()
    sign: float = 1.0

    @property
    def sides(self) -> tuple[tuple[Conversation, float], ...]:
        better = Conversation(self.messages, self.tools), self.sign
        return (better, (Conversation(self.worse, self.tools), -self.sign)) if self.worse else (better,)


def to_judged(row: Row, format: str) -> Judged:
    """Read one row as "preference" or "kto". Raises RowError."""
    return _pair(row) if format == "preference" else _marked(row)


# --- two answers ------------------------------------------------------------------------------------------------------


def _pair(row: Row) -> Judged:
    better, worse = _sides(row)
    answers = {name: _opened(row[name], name) for name in (better, worse)}
    rest = {key: value for key, value in row.items() if key not in answers}
    read = {name: read_with(rest, value, name) for name, value in answers.items()}
    chosen, rejected = read[better], read[worse]
    if chosen.messages == rejected.messages:
        raise RowError(f"{better} and {worse} are the same")
    shared = _shared(chosen.messages, rejected.messages)
    for name, messages in ((better, chosen.messages), (worse, rejected.messages)):
        if not any(message["role"] == "assistant" for message in messages[shared:]):
            raise RowError(f"{name} adds no answer to what both of them say")
    if not any(message["role"] == "user" for message in chosen.messages[:shared]):
        raise RowError(f"{better} and {worse} do not answer the same question", file_hint=_PAIR)
    messages, worse_messages = (context_before(one.messages, shared) for one in (chosen, rejected))
    return Judged(messages, chosen.tools, remarks=chosen.remarks, worse=worse_messages)


def _sides(row: Row) -> tuple[str, str]:
    """The columns of the better and the worse answer. Raises RowError."""
    names = {plain_word(name): name for name, value in row.items() if value is not None}
    if "chosen" in names and "rejected" in names:
        return names["chosen"], names["rejected"]
    found = list(preferences_of(names))
    if len(found) == 1:
        return found[0]
    what = "several columns may be the better answer" if found else "preference needs the columns chosen and rejected"
    there = column_names([name for name in row if row[name] is not None])
    raise RowError(f"{what}; this row has: {there}", file_hint=_COLUMNS)


def _opened(value: Any, name: str) -> Any:
    """An answer as a text or turns; a lone turn is a list of one."""
    if is_blank(value):
        raise RowError(f"{name} is empty")
    if isinstance(value, str) and not is_turns(value):
        return value
    value = parsed(value, name)
    return [value] if isinstance(value, Mapping) else value


def read_with(rest: Row, answer: Any, name: str) -> Conversation:
    """The conversation that ends with this answer."""
    try:
        whole = isinstance(answer, list) and is_turns(answer) and _role(answer[0]) != "assistant"
        if whole:
            return _whole(rest, answer)
        if asked := next((key for key in rest if plain_word(key) in TURN_COLUMNS and is_turns(rest[key])), None):
            taken = {**{key: value for key, value in rest.items() if key != asked}, "prompt": rest[asked]}
            return to_conversation({**taken, "completion": answer}, "prompt-completion")
        as_answer = {**rest, "completion": answer}
        if not any(plain_word(key) in QUESTION_WORDS and not is_blank(value) for key, value in rest.items()):
            raise RowError("there is no question beside the two answers", file_hint=_PAIR)
        reading = detect(as_answer)
        return to_conversation(renamed(as_answer, reading.columns), reading.format)
    except RowError as error:  # of a row that we have made: its words are ours, the column is the row's
        reason = error.reason.replace("completion", name)
        raise RowError(reason, error.hint, error.file_hint) from None


def _whole(rest: Row, turns: list[Any]) -> Conversation:
    """A conversation of turns that begin with the question; a column that repeats the question is read by that."""
    conversation = to_conversation({**_beside(rest), "messages": turns}, "messages")
    said = {message["content"].strip() for message in conversation.messages if message["role"] == "user"}
    for key, value in rest.items():
        if plain_word(key) in QUESTION_WORDS and isinstance(value, str) and value.strip() and value.strip() not in said:
            raise RowError(f"{key} is another question than the turns ask", file_hint=f"take the column {key} out")
    return conversation


def _beside(rest: Row) -> dict[str, Any]:
    asks = {key for key in rest if plain_word(key) in QUESTION_WORDS or plain_word(key) in TURN_COLUMNS}
    return {key: value for key, value in rest.items() if key not in asks}


def _role(turn: Any) -> str | None:
    values = object_of(turn) or {}
    return next((role for key in ("role", "from") if (role := role_of(values.get(key)))), None)


def _shared(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    """How many first messages are the same."""
    least = min(len(one), len(other))
    return next((at for at in range(least) if one[at] != other[at]), least)


def context_before(messages: tuple[Message, ...], first: int) -> tuple[Message, ...]:
    """The messages, of which answers before `first` are context."""
    return tuple(
        {**message, "train": False} if at < first and message["role"] == "assistant" else message
        for at, message in enumerate(messages)
    )


# --- one answer and a mark --------------------------------------------------------------------------------------------


def _marked(row: Row) -> Judged:
    names = [name for name in row if plain_word(name) in ALL_RATINGS and not is_blank(row[name])]
    if list(preferences_of({plain_word(name): name for name in row if not is_blank(row[name])})):
        raise RowError("these are pairs of answers, not marked ones", file_hint='format = "preference"')
    if "label" in names:
        names = ["label"]
    if len(names) != 1:
        what = f"{' and '.join(names)} are two marks" if names else "kto needs the column label: true or false"
        there = column_names([name for name in row if row[name] is not None])
        raise RowError(f"{what}; this row has: {there}", file_hint='name it: columns = { label = "…" }')
    good = is_rated_good(names[0], row[names[0]])
    rest = {key: value for key, value in row.items() if key != names[0]}
    reading = detect(rest)
    conversation = to_conversation(renamed(rest, reading.columns), reading.format)
    last = len(conversation.messages) - 1
    if conversation.text is not None or conversation.messages[last]["role"] != "assistant":
        raise RowError("it does not end with an answer that the mark could be of")
    judged = Judged(context_before(conversation.messages, last), conversation.tools, remarks=conversation.remarks)
    return replace(judged, sign=1.0 if good else -1.0)
