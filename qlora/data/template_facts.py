"""What a chat template does, seen from small conversations that it renders once at the start.

Nothing is guessed from a template's source. Where an answer begins, which token ends it, whether reasoning is written
and kept: each is read off texts with placeholders in them. `render` gives None where the template refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.call_shapes import CALL_ID, PLACEHOLDERS
from qlora.data.formats import Message

Render = Callable[[Sequence[Message], bool], str | None]

QUESTION: Message = {"role": "user", "content": "Question?"}
_NEXT: Message = {"role": "user", "content": "Next?"}
_HERE, _THERE = PLACEHOLDERS
# How blocks of thoughts are opened and shut: Qwen, DeepSeek and most; Gemma 4; Mistral; Cohere; EXAONE; Seed.
BLOCKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
)
# A token that opens the next speaker's turn and so ends the answer before it, where the template writes no other end:
# GLM-4's <|user|> and <|observation|>.
_SPEAKER = re.compile(r"user|human|observation|tool", re.IGNORECASE)


@dataclass(frozen=True)
class Ends:
    """The special tokens with which an answer and a call end; "" where the template writes none."""

    answer: str = ""
    call: str = ""

    @property
    def all(self) -> list[str]:
        return [end for end in dict.fromkeys((self.answer, self.call)) if end]


@dataclass(frozen=True)
class Facts:
    """`lead`: the end of the serving prompt that an answer in the history may not have before it: a block of thoughts
    that is opened (`<think>\\n`) or shut for the model.
    `header`: what the prompt adds to a question. `preludes`, `call_preludes`: what the template itself may write
    between the prompt, less the lead, and an answer's words or a call's name, longest first.
    `first_end_is_the_end`: the first end token after an answer's beginning is its own, in every kind of turn.
    `writes_thoughts`, `writes_inline_thoughts`: of the last answer, from their own key and from its text.
    `changes_later`: an answer is written otherwise once another turn follows.
    `marks_begin_answers`: generation marks begin where the serving prompt ends, not before.
    """

    lead: str
    header: str
    preludes: tuple[str, ...]
    call_preludes: tuple[str, ...]
    first_end_is_the_end: bool
    writes_thoughts: bool
    writes_inline_thoughts: bool
    changes_later: bool
    marks_begin_answers: bool

    def block(self) -> tuple[str, str] | None:
        """The marks of the block of thoughts that the lead opens; None where it holds none."""
        return next((block for block in BLOCKS if block[0] in self.lead), None)

    def shuts_block(self) -> bool:
        block = self.block()
        return block is not None and block[1] in self.lead


def answer(text: str = _HERE, **keys: Any) -> Message:
    return {"role": "assistant", "content": text, **keys}


def call(*names: str) -> Message:
    functions = [{"name": name, "arguments": {}} for name in names]
    return answer("", tool_calls=[{"type": "function", "id": CALL_ID, "function": function} for function in functions])


def result(text: str = "Result.", name: str = _HERE) -> Message:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": CALL_ID}


_INLINE = answer(f"<think>\n{_HERE}\n</think>\n\n{_THERE}")
_LATER = (_NEXT, answer(_THERE))
_CALL_TALKS = (
    [QUESTION, call(_HERE)],
    [QUESTION, call(_HERE), result()],
    [QUESTION, call(_HERE), result(), answer(_THERE), *_LATER],
)


def find_ends(render: Render, specials: Sequence[str], eos: str | None, text: str) -> Ends:
    """How answers and calls end. `text`: the question and an answer, rendered."""
    after = text.rpartition(_HERE)[2]
    found = specials_in(after, specials)
    if found and after[: after.index(found[0])].strip() and eos not in found:
        return Ends()
    history = render([QUESTION, answer(), _NEXT, answer(_THERE)], False) or ""
    between = history.partition(_HERE)[2].partition(_NEXT["content"])[0]
    # Of several in a row (Command's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>) EOS ends the turn, if it ends each one:
    # Phi 3's stands only after the last.
    in_each = specials_in(after[: common_length(after, between)], specials)
    end = eos if eos in in_each else found[0] if found else _end_of_history(render, between, specials)
    with_call = render([QUESTION, call(_HERE)], False) or ""
    after_call = specials_in(with_call.rpartition(_HERE)[2], specials)
    if end and end in after_call:
        return Ends(end, end)
    if end == "" or not _SPEAKER.search(end):
        # Llama 3.1 ends some calls with <|eom_id|>. Other special tokens may close the call's parts: the last counts.
        return Ends(end, after_call[-1] if after_call and end else end)
    with_result = render([QUESTION, call(_HERE), result(_THERE)], False) or ""
    following = specials_in(with_result.rpartition(_THERE)[0].rpartition(_HERE)[2], specials)
    speakers = [token for token in following if _SPEAKER.search(token)]
    return Ends(end, speakers[0] if speakers else end)


def _end_of_history(render: Render, between: str, specials: Sequence[str]) -> str:
    """What ends an answer that another turn follows, where a last one is left open."""
    found = specials_in(between, specials)
    if not found or between[: between.index(found[0])].strip():
        return ""
    opened = specials_in((render([QUESTION], False) or "").partition(QUESTION["content"])[0], specials)
    return found[0] if found[0] not in opened or _SPEAKER.search(found[0]) else ""


def find_facts(render: Render, ends: Sequence[str], marks: Sequence[tuple[int, int]]) -> Facts:
    """`marks`: those of a question and an answer."""
    prompt = render([QUESTION], True) or ""
    text = render([QUESTION, answer()], False) or ""
    history = render([QUESTION, answer(), _NEXT, answer(_THERE)], False) or text
    before = history.partition(_HERE)[0]
    alone = render([QUESTION], False) or ""
    header = prompt[len(alone) :] if prompt.startswith(alone) else ""
    opened = max(header.rfind(opening) for opening, _ in BLOCKS)
    lead = header[opened:] if opened >= 0 else prompt[len(before) :] if before and prompt.startswith(before) else ""
    base = prompt[: len(prompt) - len(lead)]
    opener = header.removesuffix(lead)
    thoughtful = answer("Words.", reasoning_content=_HERE)
    written = render([QUESTION, thoughtful], False)
    kept = render([QUESTION, thoughtful, _NEXT, answer(_THERE)], False)
    writes_thoughts = written is not None and _HERE in written
    return Facts(
        lead,
        header,
        _preludes(render, base, opener, ([QUESTION, answer()], [QUESTION, answer(), *_LATER])),
        _preludes(render, base, opener, _CALL_TALKS),
        _first_end_is_the_end(render, ends),
        writes_thoughts,
        _HERE in (render([QUESTION, _INLINE], False) or ""),
        opened >= 0
        or (writes_thoughts and kept is not None and _HERE not in kept)
        or text.partition(_HERE)[0] != before,
        bool(marks) and marks[0][0] >= len(prompt) and text.startswith(prompt),
    )


def find_inline_thoughts(render: Render, knows_think: bool) -> bool | None:
    """Whether reasoning is to be put into the answers' text (True), out of it (False), or left where it is."""
    inline = render([QUESTION, _INLINE], False) or ""
    keyed = render([QUESTION, answer(_THERE, reasoning_content=_HERE)], False) or ""
    if _HERE in keyed:
        return None if inline == keyed else False
    return True if knows_think and _HERE in inline else None


def _preludes(render: Render, base: str, header: str, talks: Sequence[Sequence[Message]]) -> tuple[str, ...]:
    """What stands between the serving prompt, without its lead, and the placeholder of each conversation."""
    found = set()
    for messages in talks:
        text = render(messages, False)
        before = (text or "").partition(_HERE)[0]
        if before == text or text is None:
            continue
        if before.startswith(base):
            found.add(before[len(base) :])
        elif header and header in before:  # what stands before the header depends on what follows
            found.add(before.rpartition(header)[2])
    return tuple(sorted(found, key=len, reverse=True))


def _first_end_is_the_end(render: Render, ends: Sequence[str]) -> bool:
    """Whether the first end token after a turn's words is where the turn ends too when nothing follows it."""
    turns: list[tuple[list[Message], Message, list[Message]]] = [([QUESTION], answer(), [_NEXT, answer(_THERE)])]
    for names in (("one", _HERE), (_HERE,)):
        if render([QUESTION, call(*names)], False) is not None:
            turns.append(([QUESTION], call(*names), [result(_THERE, names[0]), answer(_THERE)]))
            break
    for before, turn, after in turns:
        alone, followed = render([*before, turn], False), render([*before, turn, *after], False)
        if alone is None or followed is None or _HERE not in alone:
            continue
        tail, end = split_end(alone.partition(_HERE)[2], ends)
        rest = followed.partition(_HERE)[2].partition(_THERE)[0]
        first = first_end(rest, ends)
        if not end or first is None or rest[: first[0]] != tail:
            return False
    return True


def first_end(text: str, ends: Sequence[str], start: int = 0, limit: int | None = None) -> tuple[int, int] | None:
    """Characters of the first end token in a text."""
    limit = len(text) if limit is None else limit
    places = [(text.find(end, start, limit), -len(end)) for end in ends]
    found = min((place for place in places if place[0] >= 0), default=None)
    return (found[0], found[0] - found[1]) if found else None


def split_end(text: str, ends: Sequence[str]) -> tuple[str, str]:
    """A turn that nothing follows: what is written before its end token, and that token ("" where it has none).

    Of several end tokens in a row the turn's own one counts (the first of `ends`), else the first in the text.
    """
    rest, run = text.rstrip(), list[tuple[int, str]]()
    while end := next((end for end in ends if rest.endswith(end)), ""):
        run.append((len(rest) - len(end), end))
        rest = rest[: -len(end)].rstrip()
    if not run:
        return rest, ""
    place, end = next(((at, end) for at, end in reversed(run) if end == ends[0]), run[-1])
    return text[:place], end


def begins_with_empty_block(text: str, opened: tuple[str, str] | None) -> bool:
    """Whether a text begins with a block of thoughts without any; `opened`: the block that stands open before it."""
    rest = text.lstrip()
    if opened and rest.startswith(opened[1]):
        return True
    return rest[:1] in "<[" and any(
        rest.startswith(start) and rest[len(start) :].lstrip().startswith(end) for start, end in BLOCKS
    )


def common_length(one: str, other: str) -> int:
    """How many characters the beginnings of two texts share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def specials_in(text: str, specials: Sequence[str]) -> list[str]:
    """The special tokens in `text`, in their order; of two that begin together only the longer."""
    longest_first = sorted(specials, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, longest_first)), text) if longest_first else []
