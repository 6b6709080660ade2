"""A conversation as the rows in which each of its answers stands as it is served.

Some templates write an answer otherwise once more turns follow: without its thoughts (Qwen 3, Gemma 4), without the
block of thoughts that the served prompt opens or shuts (Qwen 3.5, DeepSeek R1), with another end (harmony). A model
never writes such an answer, it only reads it. So an answer is trained in the whole conversation where its text there is
the served one; else in a row of its own that ends with it. Rows are as few as that allows: what stands as it is served
in a row that another answer needs is trained there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

from qlora.data import limits, spans
from qlora.data.formats import Conversation, Message
from qlora.data.render import Request
from qlora.data.row_json import RowError
from qlora.data.template import ChatTemplate
from qlora.data.template_facts import QUESTION, answer, call, result

# Rendered ahead in one go.
_CHUNK_ROWS = 64
# Of all rows that one conversation becomes. A thousand short turns would be rows of 50 million characters; this is what
# is tokenized in some 10 s, and a conversation of 2,000 tokens with 100 answers takes a tenth of it.
MAX_CHARS = 4 << 20
_NEXT: Message = {"role": "user", "content": "Next?"}
_THOUGHTS = {"reasoning_content": "First of all."}
_TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "name", "description": "", "parameters": {"type": "object"}}},
)
_INLINE = "<think>\nFirst of all.\n</think>\n\nWords."
# Answers of every kind, each followed by others: a template that writes all of these as they are served rewrites none.
_TALKS: tuple[tuple[Message, ...], ...] = (
    (QUESTION, answer("Words."), _NEXT, answer("More.")),
    (QUESTION, answer("\n Words.\n\n"), _NEXT, answer("More.")),
    (QUESTION, answer("Words.", **_THOUGHTS), _NEXT, answer("More.", **_THOUGHTS)),
    (QUESTION, answer(_INLINE), _NEXT, answer(_INLINE)),
    (QUESTION, call("name"), result(), answer("Words."), _NEXT, answer("More.")),
    (QUESTION, {**call("name"), "content": "Words.", **_THOUGHTS}, result(), answer("Words."), _NEXT, answer("More.")),
)
# Rows with their places, what is bad among them.
Batch = Sequence[tuple[str, Conversation | RowError]]


@dataclass(frozen=True)
class _Written:
    """What a row trains of an answer: its text with its end; and whether the end of the served prompt is before it."""

    text: str
    after_lead: bool


class ServedRows:
    """Splits conversations for one template.

    `check` raises RowError for a conversation that is refused. Such a one is given back as it is, and so is one over
    the limits of size: both meet their error where they are tokenized. Into `dropped` goes what is left untrained,
    and how many conversations became how many rows.
    """

    def __init__(self, template: ChatTemplate, check: Callable[[Conversation], None], dropped: Counter[str]) -> None:
        self._template, self._check, self._dropped = template, check, dropped

    @cached_property
    def _needed(self) -> bool:
        """Whether the template writes any answer otherwise later; most do not, and nothing of theirs is looked at."""
        talks = [Conversation(talk, tools) for talk in _TALKS for tools in (None, _TOOLS)]
        self._template.render_ahead([text for talk in talks for text in self._wanted(talk)])
        return any(len(self._rows(talk)) > 1 for talk in talks)

    def in_batch(self, batch: Batch, bounds: limits.TextLimits) -> Batch:
        """The batch with the rows of each conversation in its place, the shortest first."""
        if not self._needed:
            return batch
        rows = self._of_each([item for _, item in batch if isinstance(item, Conversation)], bounds)
        made: list[tuple[str, Conversation | RowError]] = []
        for where, item in batch:
            made += [(where, row) for row in next(rows)] if isinstance(item, Conversation) else [(where, item)]
        return made

    def _of_each(
        self, conversations: Sequence[Conversation], bounds: limits.TextLimits
    ) -> Iterator[tuple[Conversation, ...]]:
        for chunk in limits.chunks(conversations, _CHUNK_ROWS):
            followed = [_is_followed(item) for item in chunk]
            if len(chunk) > 1 or limits.rendered_chars(chunk[0]) <= limits.CHUNK_CHARS:
                self._template.render_ahead([text for item in compress(chunk, followed) for text in self._wanted(item)])
            for item, may_change in zip(chunk, followed, strict=True):
                rows = self._checked_rows(item, bounds) if may_change else (item,)
                if len(rows) > 1:
                    self._dropped.update({"split": 1, "split rows": len(rows)})
                yield rows

    def _checked_rows(self, conversation: Conversation, bounds: limits.TextLimits) -> tuple[Conversation, ...]:
        try:
            limits.check_size(conversation, bounds.row_chars)
            self._check(conversation)
        except RowError:
            return (conversation,)
        return self._rows(conversation)

    def _wanted(self, conversation: Conversation) -> Iterator[Request]:
        """The renderings that `_rows` will want, as far as they are known beforehand."""
        yield from spans.requests(self._template, conversation)
        for number in _trained(conversation):
            yield from spans.requests(self._template, _row(conversation, [number]))

    def _rows(self, conversation: Conversation) -> tuple[Conversation, ...]:
        served: dict[int, _Written] = {}
        groups: list[list[int]] = []  # answers of one row, the last of which ends it
        answers, until_end = _trained(conversation), ""
        room = MAX_CHARS - limits.text_chars(conversation.messages)  # of the last row
        for at, number in enumerate(answers):
            alone = self._alone(conversation, number)
            if alone is None:
                return (conversation,)  # what cannot be compared stays where it is found
            served[number], before, until_end = alone[0], until_end, alone[1]
            if groups and until_end.startswith(before):
                groups[-1].append(number)
            else:
                room -= len(before)
                groups.append([number])
            if room < 0 and at < len(answers) - 1:
                groups[-1] = answers[-1:]
                self._dropped["long"] += len(answers) - 1 - at
                break
        else:
            if self._written(conversation) == served:
                return (conversation,)
        return tuple(_row(conversation, row) for group in groups for row in self._shared(conversation, group, served))

    def _shared(self, conversation: Conversation, group: list[int], served: Mapping[int, _Written]) -> list[list[int]]:
        """The answers by the rows that they need: one row for all where each stands in it as it is served."""
        if len(group) == 1 or self._written(_row(conversation, group)) == {number: served[number] for number in group}:
            return [group]
        return [[number] for number in group]

    def _alone(self, conversation: Conversation, number: int) -> tuple[_Written, str] | None:
        """An answer as it is served, and all the text up to its end; None where that is not found."""
        row = _row(conversation, [number])
        try:
            located = spans.locate(self._template, row, Counter())
        except RowError:
            return None
        if len(located.turns) != 1:
            return None
        written = self._one(located, located.turns[0])
        return written, located.text[: located.turns[0].start] + written.text

    def _written(self, conversation: Conversation) -> dict[int, _Written]:
        """What the row trains of each of its answers; nothing where they are not found in its text."""
        try:
            located = spans.locate(self._template, conversation, Counter())
        except RowError:
            return {}
        numbers = _trained(conversation)
        if len(numbers) != len(located.turns):
            return {}
        return {n: self._one(located, turn) for n, turn in zip(numbers, located.turns, strict=True)}

    def _one(self, located: spans.Located, turn: spans.Turn) -> _Written:
        text = located.text[turn.start : turn.end]
        if not self._template.writes_end:
            text = text.rstrip()  # an end is added to a row, and to no answer
        elif located.open_end == turn.end and not located.text[turn.end :].strip():
            text += located.end_token
        return _Written(text, located.text[: turn.start].endswith(self._template.facts.lead))


def _trained(conversation: Conversation) -> list[int]:
    """Numbers of the messages that are trained answers."""
    return [
        number
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]


def _is_followed(conversation: Conversation) -> bool:
    """Whether anything follows a trained answer."""
    return any(number + 1 < len(conversation.messages) for number in _trained(conversation))


def _row(conversation: Conversation, numbers: Sequence[int]) -> Conversation:
    """The conversation up to the last of these answers, which are trained in it."""
    upto = replace(conversation, messages=conversation.messages[: numbers[-1] + 1])
    return _with_answers(upto, numbers)


def _with_answers(conversation: Conversation, numbers: Sequence[int]) -> Conversation:
    """The conversation with only these answers trained."""
    others = set(_trained(conversation)).difference(numbers)
    messages = tuple({**m, "train": False} if at in others else m for at, m in enumerate(conversation.messages))
    return replace(conversation, messages=messages)
