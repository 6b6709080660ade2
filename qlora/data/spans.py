"""Where the answers stand in a rendered conversation: from the end of the served prompt to the token that ends a turn.

What is trained must be what the model writes when it is served, turn by turn. So an answer begins where the prompt ends
that a server sends for it (the messages before it, rendered with `add_generation_prompt`), and it ends with what the
template writes of it when nothing follows: a tool's result that the template puts into the same turn is not the
model's. Some templates rewrite the history once more turns follow (Mistral's move the system prompt, Qwen 3's drop old
reasoning), so that the prompt is no beginning of the text: then a placeholder in the answer's place shows where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from qlora.data.call_shapes import PLACEHOLDERS, THINK, thoughts_of, without_thoughts, words_of
from qlora.data.formats import Conversation, Message
from qlora.data.render import Request
from qlora.data.row_json import RowError, json_text
from qlora.data.template import ChatTemplate
from qlora.data.template_facts import begins_with_empty_block, common_length, first_end, split_end

_HINT = "give another template (chat_template, a file, under [model]), or end the row after that answer"


@dataclass(frozen=True)
class Turn:
    """A trained turn, in characters of the rendered text. `closed`: its end token is part of it.

    `template_space`: it begins with white space of the template, not of the answer's own.
    """

    start: int
    end: int
    closed: bool
    template_space: bool


@dataclass(frozen=True)
class Located:
    """A conversation's text and its trained turns. `open_end`: where the text's last turn ends, if no token ends it."""

    text: str
    turns: tuple[Turn, ...]
    end_token: str
    open_end: int | None = None


def locate(template: ChatTemplate, conversation: Conversation, dropped: Counter[str]) -> Located:
    """The text and the trained turns. What the template leaves out of these is counted. Raises RowError."""
    return _Locator(template, conversation, dropped).located()


def requests(template: ChatTemplate, conversation: Conversation) -> list[Request]:
    """The renderings that `locate` will want, as far as they are known beforehand."""
    messages, tools = _as_trained(template, conversation.messages), conversation.tools
    whole = template.request(messages, tools)
    wanted, others = [whole], list[Request]()
    if template.has_marks(tools):
        return wanted
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", True):
            wanted.append(whole.prompt(number))
            compared = not template.facts.first_end_is_the_end or _may_be_unwritten(message)
            if compared and number + 1 < len(messages):
                others.append(template.request(messages[: number + 1], tools))
    return wanted + others


def _as_trained(template: ChatTemplate, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages without what could not be trained as it is served.

    What follows the last answer is left out where the template would write that answer otherwise for it; reasoning,
    where the prompt shuts the block of thoughts.
    """
    if template.facts.changes_later:
        last = max((number for number, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        messages = messages[: last + 1]
    return without_shut_thoughts(template, messages)


def without_shut_thoughts(template: ChatTemplate, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages without reasoning, where the served prompt shuts the block of thoughts."""
    if not template.facts.shuts_block():
        return messages
    return [without_thoughts(message) if message["role"] == "assistant" else message for message in messages]


def _may_be_unwritten(message: Message) -> bool:
    """Whether an answer has neither words nor calls: some templates write no turn at all of it."""
    return not words_of(message) and "tool_calls" not in message


class _Locator:
    """One conversation on its way through `locate`."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, dropped: Counter[str]) -> None:
        self.template, self.facts, self.dropped = template, template.facts, dropped
        self.messages, self.tools = _as_trained(template, conversation.messages), conversation.tools
        self.given = conversation.messages
        self.whole = template.request(self.messages, self.tools)
        self.prompts: dict[int, str | None] = {}  # that are served for answers
        self.without_lead: set[int] = set()  # answers that have not before them what the served prompt ends with
        self.ends = template.end_tokens
        self.answers = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        self.trained = [bool(self.messages[number].get("train", True)) for number in self.answers]

    def located(self) -> Located:
        text, marks = self.template.rendered(self.whole)
        mark_ends: list[int | None] = [None] * len(self.answers)
        trusted = self.template.has_marks(self.tools)
        if trusted and marks and self.answers and (len(marks) == len(self.answers) or all(self.trained)):
            starts, mark_ends = [start for start, _ in marks], [end for _, end in marks]
            if len(marks) != len(self.answers):
                # The template marks an answer's parts one by one: then marks and messages have no common numbers.
                self.answers, self.trained = [self.answers[-1]] * len(marks), [True] * len(marks)
        else:
            text, marks = self._as_served(text), []
            self.answers, self.trained = list(compress(self.answers, self.trained)), [True] * sum(self.trained)
            starts = self._starts(text)
            if len(starts) == 1 and self.answers[0] == len(self.messages) - 1:
                text, starts = self._after_served_history(text, starts[0])
        limits = [*starts, len(text)][1:]
        if any(start >= limit for start, limit in zip(starts, limits, strict=True)):
            raise RowError("the answers cannot be told apart in the rendered text")
        turns, open_end = [], None
        for at, number in enumerate(self.answers):
            if not self.trained[at]:
                continue
            start, limit = starts[at], limits[at]
            end, closed = self._end(text, number, (start, limit), mark_ends[at])
            turns.append(Turn(start, end, closed, self._begins_with_template_space(number, text[start:end])))
            open_end = None if closed else end
            self._count(number, text[start:end], text[start:limit], closed or not text[end:].strip())
        self._count_systems(text)
        return Located(text, tuple(turns), self._end_token(), open_end)

    def _begins_with_template_space(self, number: int, written: str) -> bool:
        content = self.messages[number]["content"]
        own = content[:1].isspace() and written.lstrip().startswith(
            content.split(None, 1)[0] if content.split() else ""
        )
        return written[:1].isspace() and not own

    def _end_token(self) -> str:
        """What ends the last trained answer."""
        calls = bool(self.answers) and "tool_calls" in self.messages[self.answers[-1]]
        return (calls and self.template.ends.call) or self.ends[0]

    # --- the text as it is served -------------------------------------------------------------------------------

    def _as_served(self, text: str) -> str:
        """The text with its last answer as it follows the served prompt, where that opens or shuts a block of thoughts
        which the template does not write before an answer of its own accord (DeepSeek R1)."""
        number, lead = len(self.messages) - 1, self.facts.lead
        if not lead or not self.answers or self.answers[-1] != number or not self.trained[-1]:
            return text
        prompt = self._prompt(number)
        if prompt is None or text.startswith(prompt) or not prompt.endswith(lead):
            return text
        base = prompt[: -len(lead)]
        if not text.startswith(base):
            return text
        body, block = text[len(base) :], self.facts.block()
        if block is None:
            return prompt + body
        opening, closing = block
        if self.facts.shuts_block():
            if body.lstrip().startswith(opening):
                body = body.partition(closing)[2]
            return prompt + body.lstrip("\n")
        if body.lstrip().startswith(opening):
            return prompt + body.lstrip()[len(opening) :].lstrip("\n")
        thoughts = thoughts_of(self.messages[number])
        line = "\n" if lead.endswith("\n") else ""
        return f"{prompt}{thoughts}{line}{closing}\n\n{body.lstrip(chr(10))}"

    def _after_served_history(self, text: str, start: int) -> tuple[str, list[int]]:
        """The text and where its only trained answer begins, after the history that is served: harmony drops the
        analysis before a call from a text that has a final answer, and not from the prompt for that answer."""
        prompt = self._prompt(self.answers[0]) or ""
        if text.startswith(prompt.removesuffix(self.facts.header)):
            return text, [start]
        return prompt + text[start:], [len(prompt)]

    # --- where answers begin ------------------------------------------------------------------------------------

    def _starts(self, text: str) -> list[int]:
        starts: list[int] = []
        for number in self.answers:
            starts.append(self._start(text, number, starts[-1] if starts else 0))
        return starts

    def _start(self, text: str, number: int, previous_start: int) -> int:
        """Where answer `number` begins: after the prompt that a server would send for it."""
        prompt, lead, header = self._prompt(number), self.facts.lead, self.facts.header
        if prompt:
            if text.startswith(prompt):
                # After a tool's result some prompts (Gemma 4's) leave out the header that the text has.
                after_result = number > 0 and self.messages[number - 1]["role"] == "tool"
                again = after_result and header.strip() and text.startswith(header, len(prompt))
                return len(prompt) + (len(header) if again else 0)
            if lead and prompt.endswith(lead) and text.startswith(prompt[: -len(lead)]):
                self.without_lead.add(number)
                return self._after_lead(text, len(prompt) - len(lead))
        place = self._start_by_replacing(text, number)
        if place is None and prompt:
            place = self._start_by_searching(text, number, prompt, previous_start)
        if place is None:
            what = f"answer {number} is not found in the rendered text: the chat template rewrites it"
            raise RowError(what, _HINT)
        return place

    def _prompt(self, number: int) -> str | None:
        if number not in self.prompts:
            try:
                prompt: str | None = self.template.rendered(self.whole.prompt(number)).text
            except RowError:
                prompt = None  # the template wants more messages than these
            self.prompts[number] = prompt
        return self.prompts[number]

    def _start_by_replacing(self, text: str, number: int) -> int | None:
        """From the conversation with a placeholder in the answer's place, less what the template puts before it."""
        other = self._with_placeholder(number)
        if other is None:
            return None
        before, message = other[0], self.messages[number]
        called = "tool_calls" in message and not message["content"].strip()
        for prelude in self.facts.call_preludes if called else self.facts.preludes:
            if before.endswith(prelude) and text.startswith(before[: len(before) - len(prelude)]):
                return self._after_lead(text, len(before) - len(prelude))
        return None

    def _after_lead(self, text: str, start: int) -> int:
        """Where the model's own text begins after `start`, where the prompt has a lead: behind what both have of it, or
        behind a whole block of thoughts which the prompt shuts."""
        lead, block = self.facts.lead, self.facts.block()
        if block is None or not text.startswith(block[0], start):
            return start + (len(lead) if text.startswith(lead, start) else 0)
        if not self.facts.shuts_block():
            return start + common_length(lead, text[start:])
        shut = text.find(block[1], start) + len(block[1])
        space = lead.rpartition(block[1])[2]
        return shut + common_length(space, text[shut:])

    def _with_placeholder(self, number: int) -> tuple[str, str] | None:
        """The text before and after a placeholder that stands for an answer, or for the name of its first call."""
        message = without_thoughts(self.messages[number])
        placeholder = next(p for p in PLACEHOLDERS if p[0] != message["content"][:1])
        calls = message.get("tool_calls")
        stand_in = {**message, "content": placeholder}
        if calls:
            named = {**calls[0], "function": {**calls[0]["function"], "name": placeholder}}
            stand_in = {**message, "content": placeholder if message["content"].strip() else ""}
            stand_in["tool_calls"] = [named, *calls[1:]]
        messages = [stand_in if at == number else other for at, other in enumerate(self.messages)]
        try:
            other = self.template.render(messages, self.tools)
        except RowError:
            return None
        before, found, _ = other.partition(placeholder)
        return (before, other.rpartition(placeholder)[2]) if found else None

    def _start_by_searching(self, text: str, number: int, prompt: str, previous_start: int) -> int | None:
        """From the end of the prompt, its last message on, after the previous answer."""
        tail = self._tail(prompt, number)
        ended = first_end(text, self.ends, previous_start)
        after = ended[1] if ended and previous_start else previous_start
        place = text.find(tail, after) if tail else -1
        return place + len(tail) if place >= 0 else None

    def _tail(self, prompt: str, number: int) -> str:
        """The end of a prompt, from the content of its last message on; "" where that is unclear."""
        messages = self.messages[:number]
        if not messages or not messages[-1]["content"].strip():
            return ""
        replaced = [*messages[:-1], {**messages[-1], "content": PLACEHOLDERS[0]}]
        try:
            other = self.template.render(replaced, self.tools, add_generation_prompt=True)
        except RowError:
            return ""
        before, found, after = other.rpartition(PLACEHOLDERS[0])
        return prompt[len(before) :] if found and prompt.startswith(before) and prompt.endswith(after) else ""

    # --- where they end -----------------------------------------------------------------------------------------

    def _end(self, text: str, number: int, within: tuple[int, int], mark_end: int | None) -> tuple[int, bool]:
        """Where an answer ends, and whether with its end token. `within`: its start, and where the next one begins."""
        start, limit = within
        first = first_end(text, self.ends, start, limit)
        if mark_end is not None:
            # The end token stands in a mark or right behind it.
            if first and not (mark_end < first[0] and text[mark_end : first[0]].strip()):
                return first[1], True
            return start + len(text[start:mark_end].rstrip()), False
        if self.facts.first_end_is_the_end and first:
            another = text[start : first[0]].strip() and self._writes_nothing(text, number, start)
            return (start, False) if another else (first[1], True)  # `another`: it ends somebody else's turn
        if number == len(self.messages) - 1:
            body, end = split_end(text[start:limit], self.ends)
            return start + len(body) + len(end), bool(end)
        for body, _ in self._alone(number):
            if text.startswith(body, start):
                following = first_end(text, self.ends, start + len(body), limit)
                if following and following[0] == start + len(body):
                    return following[1], True
                return start + len(body.rstrip()), False
        if first:
            return first[1], True
        other = self._with_placeholder(number)
        if other is None or not text.endswith(other[1]):
            what = f"the end of answer {number} is not found: the chat template rewrites it"
            raise RowError(what, _HINT)
        return len(text) - len(other[1]), False

    def _writes_nothing(self, text: str, number: int, start: int) -> bool:
        """Whether the template writes nothing of an answer that others follow, not even its end."""
        if number + 1 == len(self.messages) or not _may_be_unwritten(self.messages[number]):
            return False
        alone = [body + end for body, end in self._alone(number)]
        written = any(turn.strip() and text.startswith(turn, start) for turn in alone)
        return not written and any(not turn.strip() for turn in alone)

    def _alone(self, number: int) -> list[tuple[str, str]]:
        """What the template writes of an answer when nothing follows it, and its end token: with and without reasoning.

        From the served prompt on, which may have a block of thoughts that this answer's text has not.
        """
        prompt, found = self._prompt(number) or "", []
        message = self.messages[number]
        for turn in (message, without_thoughts(message)):
            try:
                text = self.template.render([*self.messages[:number], turn], self.tools)
            except RowError:
                continue
            for served in (prompt, prompt.removesuffix(self.facts.lead)):
                if served and text.startswith(served):
                    found.append(split_end(text[len(served) :], self.ends))
        return found

    # --- what the template leaves out ---------------------------------------------------------------------------

    def _count(self, number: int, written: str, until_next: str, ended: bool) -> None:
        message, facts = self.given[number], self.facts
        thoughts, words = thoughts_of(message), words_of(message)
        opens = facts.block() is not None and not facts.shuts_block()
        if thoughts and thoughts not in until_next:
            keyed = bool(message.get("reasoning_content"))
            written_last = opens or (facts.writes_thoughts if keyed else facts.writes_inline_thoughts)
            kept = written_last and number + 1 < len(self.messages)
            self.dropped["shut" if facts.shuts_block() else "history" if kept else "thoughts"] += 1
        elif not thoughts:
            empty = begins_with_empty_block(written, facts.block() if opens else None)
            self.dropped["empty block"] += empty
            self.dropped["no block"] += opens and number in self.without_lead and not empty
        elif thoughts and self.template.reading.inline_thoughts and message.get("reasoning_content"):
            self.dropped["inlined"] += 1
        if words and not _stands_in(words, written):
            self.dropped["words" if "tool_calls" in message else "rewritten"] += 1
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        self.dropped["calls"] += any(written.count(name) < names.count(name) for name in names)
        self.dropped["unended"] += self.template.writes_end and not ended

    def _count_systems(self, text: str) -> None:
        contents = [m["content"].strip() for m in self.messages if m["role"] == "system"]
        self.dropped["system"] += sum(not _stands_in(content, text) for content in contents)


def _stands_in(words: str, text: str) -> bool:
    """Whether words are written, as they are or as JSON text."""
    return words in text or json_text(words, "words")[1:-1] in text or THINK.fullmatch(words) is not None
