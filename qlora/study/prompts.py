"""The prompts of a study: data in `prompts.toml`, filled here, in the language of the documents.

Two frames. `chat`: the text is what the user says, rendered by the base's chat template. `lines`: the text is the whole
prompt, a few worked examples first, for a base that continues text better than it chats; what it writes ends with its
line. An answer stands on a line of its own in both, so that its first token is the same in either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any, Literal

from qlora import foreign_toml
from qlora.study import thinking
from qlora.study.plain_text import plain

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer
    from qlora.data.documents.chunks import Passage

Frame = Literal["chat", "lines"]
Wording = Literal["ask", "ask_exam"]
WORDINGS: tuple[Wording, ...] = ("ask", "ask_exam")
FRAMES: tuple[Frame, ...] = ("chat", "lines")
KINDS = ("fact", "backward", "how", "list", "compare", "case")
FALLBACK = "en"  # for documents in a language that there are no prompts for
# What may stand before a question: our own sign, and what bases write for it by habit.
_LABEL = re.compile(
    r"^[\s>*#\-\d.)]*\**(?:Q|Question|Frage|F|Pregunta|P|问题|问)\s*\d*\**\s*[:：]\**\s*", re.IGNORECASE
)
_NUMBER = re.compile(r"^\s*(?:[-*#>]|\d+[.)])\s*")
_QUOTES = " *\"'“”"
_ENDS = ("?", "？")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one language. `texts` are those of a frame by their names, `foreign` says that the documents are
    in another language than the prompts."""

    language: str
    foreign: bool
    kinds: Mapping[str, str]
    parts: Mapping[str, str]
    texts: Mapping[str, Mapping[str, str]]

    def ask(self, frame: Frame, passage: Passage, sentence: str, kind: str, wording: Wording = "ask") -> str:
        """Asks for one question of a kind about a sentence of a passage. Answered by a line `Q: …` (chat) or by the
        question's line alone (lines): see `question_in`."""
        task = f"{self.kinds[kind]} {self.parts['same_language']}" if self.foreign else self.kinds[kind]
        return self._fill(frame, wording, passage=self._passage(passage), sentence=sentence, task=task)

    def answer(self, frame: Frame, passage: Passage, question: str) -> str:
        """Asks a question with its passage in view."""
        return self.answer_from(frame, [passage], question)

    def answer_from(self, frame: Frame, passages: Sequence[Passage], question: str) -> str:
        """Asks a question with several passages in view, in the order given: retrieval, and rows with distractors."""
        return self.answer_text(frame, "\n\n".join(map(self._passage, passages)), question)

    def answer_text(self, frame: Frame, text: str, question: str) -> str:
        """Asks a question with a text in view that is no passage of its own, such as a sentence with its headings."""
        asked = f"{question}\n{self.parts['same_language']}" if self.foreign and frame == "chat" else question
        return self._fill(frame, "answer", passage=text, question=asked)

    def closed(self, frame: Frame, question: str) -> str:
        """Asks a question alone. In the frame `chat` it is the question itself: what a user will write."""
        return self._fill(frame, "closed", question=question)

    def shown(self, passage: Passage, text: str) -> str:
        """A text as a passage is shown, with what the recipe says of its documents."""
        name = "passage_about" if passage.about else "passage"
        return _filled(self.parts[name], {"text": text, "about": passage.about})

    def _passage(self, passage: Passage) -> str:
        return self.shown(passage, passage.text)

    def _fill(self, frame: Frame, name: str, **values: str) -> str:
        texts = self.texts[frame]
        shots = texts.get(f"shots_{name.removesuffix('_exam')}", "")
        return shots + _filled(texts[name], values)


def prompts_for(language: str) -> Prompts:
    """The prompts for documents in `language` ("en", "de-AT", …); English ones, with `foreign` set, for any other."""
    table = _table()
    code = language.lower().replace("_", "-").split("-")[0]
    known = isinstance(table.get(code), dict)
    chosen = code if known else FALLBACK
    texts = table[chosen]
    parts = {name: value for name, value in texts.items() if isinstance(value, str)}
    return Prompts(chosen, not known, texts["kinds"], parts, {frame: texts[frame] for frame in FRAMES})


def languages() -> tuple[str, ...]:
    """The languages that there are prompts for."""
    return tuple(sorted(name for name, value in _table().items() if isinstance(value, dict)))


def version() -> int:
    """The version of the prompts: part of the key of whatever was asked with them."""
    return int(_table()["version"])


def served_ids(chat: ChatTokenizer, frame: Frame, text: str) -> list[int]:
    """Tokens of a prompt as a server sends it; special tokens in the text are text. Raises RowError where a template
    cannot render it."""
    text = plain(chat, text)
    if frame == "chat":
        return chat.prompt_ids([{"role": "user", "content": text}], None)
    return list(chat.tokenizer(text, verbose=False)["input_ids"])


def lead_ids(chat: ChatTokenizer, frame: Frame) -> tuple[int, ...]:
    """What of an answer the template writes itself, so that the base goes on with words and no thoughts."""
    return thinking.lead(chat) if frame == "chat" else ()


def prompt_ids(chat: ChatTokenizer, frame: Frame, text: str) -> list[int]:
    """Tokens of a prompt that the base is to continue with an answer's words. Raises RowError as `served_ids` does."""
    return [*served_ids(chat, frame, text), *lead_ids(chat, frame)]


def question_in(text: str) -> str | None:
    """The first question in what a base wrote: after `Q:`, or a line that ends with a question mark. None without."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if (found := _LABEL.match(line)) and (asked := line[found.end() :].strip(_QUOTES)):
            return asked
    bare = next((line for line in lines if line.rstrip(_QUOTES).endswith(_ENDS)), None)
    return None if bare is None else _NUMBER.sub("", bare).strip(_QUOTES)


def answer_in(text: str) -> str:
    """The answer in what a base wrote, without a label that it put before it."""
    return re.sub(r"^\s*(?:A|Answer|Antwort|Réponse|Respuesta|答)\s*[:：]\s*", "", text).strip()


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The text with its fields filled in one go: braces in a passage stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda field: values[field[1]], text)


@cache
def _table() -> dict[str, Any]:
    return foreign_toml.parse((resources("qlora.study") / "prompts.toml").read_text(encoding="utf-8"))
