"""Rows of grpo: a question, and the answer that is right. Answers to it are drawn, and rewards judge them by that.

The right answer stands in a column of its own (`answer`, or in the words of sets of mathematics and of verl), or is the
last turn of a conversation. Everything that the row has beside them is kept for functions that judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora.data.column_words import TURN_COLUMNS, column_names, detect, is_turns, preferences_of, renamed
from qlora.data.formats import Conversation, to_conversation
from qlora.data.judged import context_before, read_with
from qlora.data.role_words import ANSWER_WORDS, QUESTION_WORDS, plain_word
from qlora.data.row_json import RowError, is_blank

# The answer alone, in the words of the hub; where one of them is there, a `solution` beside it is the way to it.
_RIGHT_WORDS = (
    *("answer", "ground_truth", "groundtruth", "final_answer", "expected_answer", "reference_answer", "right_answer"),
    *("correct_answer", "gold_answer", "expected", "reference", "gold", "gt"),
)
_NESTED = ("reward_model", "reward_spec")  # of verl and its likes: {"ground_truth": …, "style": …}
_COLUMN = 'name it: columns = { answer = "…" }'
_QUESTION = 'give the question a column: {"prompt": …, "answer": …}'
MAX_COLUMNS_BYTES = 1 << 20  # of a row's columns as JSON: they are kept beside its tokens, and handed on each time


@dataclass(frozen=True)
class RewardedRow(Conversation):
    """`messages` end with the right answer; `columns` is the row as it stands in its file."""

    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


def to_rewarded(row: Mapping[str, Any]) -> RewardedRow:
    """Read one row. Raises RowError."""
    names = {plain_word(name): name for name, value in row.items() if not is_blank(value)}
    for better, worse in preferences_of(names):
        raise RowError(f"these are pairs of answers ({better} and {worse}), and grpo draws its own")
    name, answer = _right_answer(row)
    conversation = _ending_with_it(row) if name is None else _answered(row, name, answer)
    last = len(conversation.messages) - 1
    if conversation.text is not None or conversation.messages[last]["role"] != "assistant":
        raise RowError("it does not end with an answer that could be the right one", file_hint=_COLUMN)
    messages = context_before(conversation.messages, last)
    # What is unread of a row is handed to functions, but for a second question.
    remarks = tuple(one for one in conversation.remarks if one.name not in row or _asks(one.name))
    return RewardedRow(messages, conversation.tools, remarks=remarks, columns=_kept(row))


def _answered(row: Mapping[str, Any], name: str, answer: str) -> Conversation:
    """The question of a row with this answer; an answer that its turns give already is the way to it."""
    others = {key for key in row if plain_word(key) in (*_RIGHT_WORDS, *ANSWER_WORDS, *_NESTED)}
    rest = {key: value for key, value in row.items() if key not in others}
    turns = {key for key, value in rest.items() if _may_be_turns(key) and is_turns(value)}
    if not turns and not any(_asks(key) and not is_blank(value) for key, value in rest.items()):
        raise RowError(f"there is no question beside {name}", file_hint=_QUESTION)
    if turns:
        rest = {key: value for key, value in rest.items() if key in turns or not _asks(key)}
    conversation = read_with(rest, answer, name)
    *before, right = conversation.messages
    while turns and before and before[-1]["role"] in ("assistant", "tool"):
        before.pop()
    return replace(conversation, messages=(*before, right))


def _asks(key: str) -> bool:
    return plain_word(key) in QUESTION_WORDS


def _may_be_turns(key: str) -> bool:
    return _asks(key) or plain_word(key) in TURN_COLUMNS


def _right_answer(row: Mapping[str, Any]) -> tuple[str | None, str]:
    """The column of the right answer and its text; None where only the last turn can be it. Raises RowError."""
    found = {name: value for name, value in row.items() if plain_word(name) in _RIGHT_WORDS and not is_blank(value)}
    for name in _NESTED:
        inner = row.get(name)
        if isinstance(inner, Mapping) and not is_blank(inner.get("ground_truth")):
            found[f"{name}.ground_truth"] = inner["ground_truth"]
    if not found and (empty := [name for name in row if plain_word(name) in _RIGHT_WORDS and row[name] is not None]):
        raise RowError(f"{empty[0]} is empty")
    if not found:
        found = {name: row[name] for name in row if plain_word(name) in ANSWER_WORDS and not is_blank(row[name])}
    texts = {name: _text(value, name) for name, value in found.items()}
    if len(set(texts.values())) > 1:
        what = f"several columns may be the right answer: {column_names(list(texts))}"
        one, other = [*texts][:2]
        raise RowError(what, file_hint=f'say which: columns = {{ answer = "{one}", other = "{other}" }}')
    return next(iter(texts.items()), (None, ""))


def _text(value: Any, name: str) -> str:
    """An answer as it is compared: a text, or a number or a truth as JSON writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if (
        isinstance(value, Mapping)
        and plain_word(name) in ("completion", "answer")
        and isinstance(value.get("content"), str)
    ):
        return str(value["content"])
    raise RowError(
        f"{name} is no text, and answers are compared as texts", file_hint="write the right answer as a text"
    )


def _ending_with_it(row: Mapping[str, Any]) -> Conversation:
    try:
        reading = detect(row)
    except RowError:
        there = column_names([name for name in row if not is_blank(row[name])])
        what = f"grpo needs a question and the column answer; this row has: {there}"
        raise RowError(what, file_hint='name them: columns = { prompt = "…", answer = "…" }') from None
    conversation = to_conversation(renamed(dict(row), reading.columns), reading.format)
    if conversation.messages and conversation.messages[-1]["role"] != "assistant":
        hint = f"{_COLUMN}; rewards other than exact_match do not look at it"
        raise RowError("there is no right answer beside the question", file_hint=hint)
    return conversation


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(dict(row), default=str, ensure_ascii=False)
    if len(text.encode(errors="surrogatepass")) > MAX_COLUMNS_BYTES:
        what = f"its columns take {len(text):,} characters, and rows of grpo keep up to {MAX_COLUMNS_BYTES:,}"
        raise RowError(what, "take out the columns that no reward looks at")
    kept: dict[str, Any] = json.loads(text)
    return kept
