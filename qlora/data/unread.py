"""What a row brings and nothing reads: counted by its name and said once a file.

A row is opened as `Fields`, which remember the keys that somebody asked for. What was never asked for, and says
something, is a remark of the row; the report of a side counts them by file. So a key that no reader knows can't vanish,
and a reader that learns a key needs no second table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qlora.data.row_json import is_blank
from qlora.events import Event, Notice
from qlora.shown import one_line

MAX_NAMES = 30  # of one file and kind; a stranger's rows may each have other keys
MAX_SAID = 20  # of one kind, each with its file
OTHERS = "other keys"
_NUMBERS = re.compile(r"\[\d+\]")
_MAX_NAME_CHARS = 80

# What is said of a file for each kind of remark, around the names.
UNREAD, CONTEXT, NOT_ANSWERS = "unread", "context", "not answers"
CONTROL, TAUGHT, RENDERED, BROKEN = "control tokens", "control tokens in answers", "rendered", "broken up"
_WORDS = {
    UNREAD: ("nothing reads", "left out"),
    CONTEXT: ("answers are context and not trained, by their", "counted by rows"),
    NOT_ANSWERS: (
        "turns that are no answers are to be trained by their",
        "only answers are",
    ),
    CONTROL: ("special tokens of the base stand in what is asked,", "read as those tokens, as they are when served"),
    TAUGHT: ("special tokens of the base stand in answers,", "the model learns to write them, so take out mistakes"),
    RENDERED: ("special tokens of the base stand in texts,", "read as those tokens, as rendered texts need it"),
    BROKEN: ("special tokens of the base stand in the text,", "read as plain text, with a blank after the first sign"),
}
_OF_TOKENS = (CONTROL, TAUGHT, RENDERED, BROKEN)
_CONTEXT_TOO = ("answers are not to be trained by their", 'data.loss_on = "all" trains them all the same')

Counts = dict[str, dict[str, dict[str, int]]]


class Remark(NamedTuple):
    """One thing to say of a row: of which kind, and the place in it without numbers (`messages[].score`)."""

    kind: str
    name: str


class Ledger:
    """What was opened of one row, and what there is to say of it."""

    def __init__(self) -> None:
        self._opened: list[Fields] = []
        self._said: set[Remark] = set()

    def open(self, values: Mapping[str, Any], place: str = "") -> Fields:
        """An object of the row at `place` ("" for the row itself)."""
        fields = Fields(values, place)
        self._opened.append(fields)
        return fields

    def say(self, kind: str, place: str) -> None:
        self._said.add(Remark(kind, _NUMBERS.sub("[]", place)))

    def remarks(self) -> tuple[Remark, ...]:
        """All remarks, each once however often the row has it."""
        for fields in self._opened:
            for name in fields.unread():
                self.say(UNREAD, name)
        return tuple(sorted(self._said))


class Fields:
    """An object of a row that remembers which of its keys were read."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.values = values
        self.place = place
        self._read: set[str] = set()

    def get(self, *names: str) -> Any:
        """The value of the first of these keys that is not empty; None where all are. Only that one is read."""
        for name in names:
            value = self.values.get(name)
            if value is not None and value not in ("", [], {}):
                self._read.add(name)
                return value
        return None

    def take(self, name: str) -> Any:
        """The value as it stands, also an empty one; None where the key is missing."""
        self._read.add(name)
        return self.values.get(name)

    def peek(self, name: str) -> Any:
        """The value, which does not count as read by that."""
        return self.values.get(name)

    def among(self, names: Collection[str]) -> list[str]:
        """Which of these names are keys of it."""
        return [name for name in self.values if name in names]

    def where(self, name: str) -> str:
        """The place of a key: `messages[2].content`, or the name of a row's column."""
        return f"{self.place}.{name}" if self.place else name

    def unread(self) -> Iterator[str]:
        """Places of the keys that say something and were not read."""
        for name, value in self.values.items():
            if name not in self._read and not is_blank(value):
                yield self.where(name)


def count_remarks(counts: Counts, file: str, remarks: tuple[Remark, ...]) -> None:
    """Add a row's remarks to those of its file."""
    for kind, name in remarks:
        names = counts.setdefault(file, {}).setdefault(kind, {})
        name = one_line(name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}…")
        if name not in names and len(names) >= MAX_NAMES:
            name = OTHERS
        names[name] = names.get(name, 0) + 1


def first_of(events: Iterable[Event]) -> Iterator[Event]:
    """The first of events of one kind, and how many more there are: a source may have 100,000 files."""
    more = 0
    for number, event in enumerate(events):
        if number < MAX_SAID:
            yield event
        else:
            more += 1
    if more:
        yield Notice("rows", f"{more:,} more like these are not listed", more)


def notices(counts: Counts, loss_on: str = "assistant") -> Iterator[Notice]:
    """One notice for each file and kind of remark, with every name and the rows that have it.

    With `loss_on` "all" every turn is trained, whatever its switches say.
    """
    words = _WORDS if loss_on == "assistant" else {**_WORDS, CONTEXT: _CONTEXT_TOO}
    for file, kinds in counts.items():
        for kind, names in kinds.items():
            if kind == NOT_ANSWERS and loss_on == "all":
                continue
            before, after = words.get(kind, (kind, ""))
            listed = ", ".join(
                f"{name} ({rows:,} row{'s' * (rows != 1)})" for name, rows in Counter(names).most_common(MAX_NAMES + 1)
            )
            message = f"{file}: {before} {listed}" + (f": {after}" if after else "")
            yield Notice("special tokens" if kind in _OF_TOKENS else "columns", message, sum(names.values()))
