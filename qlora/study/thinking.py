"""Bases that think before they answer: a study wants the answer alone.

Three ways, the first that there is. A template with a switch is told so for the whole run (`settled`), as
`model.template_kwargs` would: what is served is what was studied. Where the template itself writes something between
its prompt and an answer without thoughts, such as an empty block of them or the head of the last channel, the base is
prompted with that too (`lead`), and rows train it as ordinary rows do. What a base thinks all the same is cut
(`Thoughts`), from its questions, its answers and their labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation, Message
from qlora.data.render import Renderer, request_of
from qlora.data.row_json import RowError
from qlora.data.template_facts import BLOCKS
from qlora.events import Notice, Sink, Sinks
from qlora.model import chat_template
from qlora.model.tokenizer_files import read_files

if TYPE_CHECKING:
    from qlora.recipe.reading import Recipe

# What templates read to leave thoughts out: Qwen3, SmolLM3, GLM 4.5 and most; DeepSeek V3.1, Granite.
SWITCHES = ("enable_thinking", "thinking")
LOOK = 32  # tokens within which thoughts begin if they do, and in which a sign of theirs stands whole
_ASKED: Message = {"role": "user", "content": "Question?"}
# Answers whose first tokens differ in any tokenizer.
_ANSWERS = ("Alpha", "7", "über", "It is so.")


# --- the template's switch --------------------------------------------------------------------------------------------


def settled(recipe: Recipe, base: Path, sink: Sink) -> Recipe:
    """The recipe of a run with documents alone, with the switch of the base's template off where nobody set any."""
    model = recipe.model
    is_set = "template_kwargs" in model.model_fields_set or model.chat_template == "chatml"
    if is_set or not recipe.data.documents or recipe.data.train:
        return recipe
    texts = chat_template.templates_of(chat_template.chosen(read_files(base), model, model.base, Sinks()))
    switch = next((name for name in SWITCHES if texts and name in texts[0] and _decides(texts[0], name)), None)
    if switch is None:
        return recipe
    message = f"model.template_kwargs = {{{switch} = false}}: documents are studied, and answered, without thoughts"
    sink.emit(Notice("documents", f"{message} (set {switch} = true to keep them)"))
    return recipe.model_copy(update={"model": model.model_copy(update={"template_kwargs": {switch: False}})})


def _decides(text: str, switch: str) -> bool:
    """Whether a template's prompt is another with the switch off."""
    renderer = Renderer([text, f"{{%- set {switch} = false %}}{text}"], {})
    values = {"messages": [_ASKED], "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        with_it, without = (renderer.render(request_of(number, values)).text for number in (0, 1))
    except RowError:
        return False
    return with_it != without


# --- what the template writes before an answer ------------------------------------------------------------------------


@lru_cache(maxsize=2)
def lead(chat: ChatTokenizer) -> tuple[int, ...]:
    """Tokens that the template writes itself between a served prompt and the words of an answer; () for most."""
    if chat.template is None:
        return ()
    reader = chat if chat.loss_on == "assistant" else ChatTokenizer(chat.tokenizer, "assistant", Sinks())
    counted = reader.dropped.copy()
    rows = reader.encode_many([Conversation((_ASKED, {"role": "assistant", "content": one})) for one in _ANSWERS])
    reader.dropped.clear()
    reader.dropped.update(counted)  # these were no rows of anybody's
    try:
        prompt = chat.prompt_ids([_ASKED], None)
    except RowError:
        return ()
    tails = []
    for row in rows:
        if not isinstance(row, TokenRow) or row.input_ids[: len(prompt)] != prompt:
            return ()
        tails.append(row.input_ids[len(prompt) :])
    same = next((at for at, tokens in enumerate(zip(*tails, strict=False)) if len(set(tokens)) > 1), 0)
    begun = tails[0][:same]
    return tuple(begun) if str(chat.tokenizer.decode(begun)).strip() else ()


def _before_answer(chat: ChatTokenizer) -> str:
    """What stands between a question and its answer, `lead` and all; "" without a template."""
    try:
        ids = [] if chat.template is None else [*chat.prompt_ids([_ASKED], None), *lead(chat)]
    except RowError:
        ids = []
    return str(chat.tokenizer.decode(ids)).rpartition(str(_ASKED["content"]))[2]


# --- what a base thinks all the same ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thoughts:
    """Tells thoughts from words in what is written, token by token. `opened`: the sign that ends the block of thoughts
    which the prompt itself has opened; "" for none."""

    tokenizer: Any
    opened: str = ""

    @classmethod
    def of(cls, chat: ChatTokenizer) -> Thoughts:
        """Of what is written behind a prompt of the chat template, and its `lead`."""
        prompt = _before_answer(chat)
        opened = (block for block in BLOCKS if block[0] in prompt)
        closing = next((shut for opening, shut in opened if shut not in prompt[prompt.rfind(opening) :]), "")
        return cls(chat.tokenizer, closing)

    def spoken_from(self, tokens: Sequence[int], is_all: bool) -> int | None:
        """Where the words begin: 0 without thoughts, None while they are open or may yet begin. See `Manner`."""
        shut = self.opened or self._shut_of(tokens, is_all)
        if shut == "":
            return 0
        if shut is None or shut not in self._text(tokens[-LOOK:]):
            return None
        end = next(at for at in range(1, len(tokens) + 1) if shut in self._text(tokens[max(0, at - LOOK) : at]))
        while end < len(tokens) and not self._text(tokens[end : end + 1]).strip():
            end += 1
        return end if end < len(tokens) or is_all else None  # the blanks behind it are still being written

    def _shut_of(self, tokens: Sequence[int], is_all: bool) -> str | None:
        """The sign that ends the thoughts which stand at the beginning; "" for none, None where that is open."""
        text = self._text(tokens[:LOOK]).lstrip()
        for opening, shut in BLOCKS:
            if text.startswith(opening):
                return shut
        may_begin = any(opening.startswith(text) for opening, _ in BLOCKS) and len(tokens) < LOOK
        return None if may_begin and not is_all else ""

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))


def may_think(chat: ChatTokenizer) -> bool:
    """Whether answers are to be expected to begin with thoughts: the prompt opens a block of them, or the template
    knows one, and nothing before the answer says that there are none."""
    if Thoughts.of(chat).opened:
        return True
    template, before = chat.template or "", _before_answer(chat)
    knows = any(opening in template for opening, _ in BLOCKS)
    return knows and not lead(chat) and not any(shut in before for _, shut in BLOCKS)


def without(text: str) -> str:
    """What is said in a text, without the block of thoughts that it begins with."""
    stripped = text.lstrip()
    for opening, shut in BLOCKS:
        if stripped.startswith(opening):
            return stripped.partition(shut)[2].strip()
    return text


def identity(chat: ChatTokenizer, recipe: Recipe) -> tuple[str, ...]:
    """What of it answers follow from; () for a base that does not think, whose records keep their names."""
    kwargs = recipe.model.template_kwargs
    begun = lead(chat)
    return () if not kwargs and not begun else (json.dumps([kwargs, begun], sort_keys=True),)
