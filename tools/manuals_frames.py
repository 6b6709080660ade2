"""How a study asks and is answered, as the tiny reading base's text shows it: through the study's own prompts.

A chat begins as a study's prompt does. Its later turns ask about the same text without showing it again, so that one
text serves several questions.
"""

from __future__ import annotations

from quickstart_world import turn

from qlora.data.documents.chunks import Passage
from qlora.study.prompts import Wording, prompts_for

PROMPTS = prompts_for("en")
Turns = list[tuple[str, str]]


def answered(passages: list[Passage], turns: Turns) -> str:
    """Questions, answered with the passages in view."""
    return _answered_from("\n\n".join(PROMPTS.shown(passage, passage.text) for passage in passages), turns)


def answered_from_sentence(passage: Passage, sentence: str, asked: tuple[str, str]) -> str:
    """A question, answered with one sentence in view."""
    text = PROMPTS.shown(passage, " › ".join(passage.headings) + "\n\n" + sentence)
    return _answered_from(text, [asked])


def _answered_from(text: str, turns: Turns) -> str:
    said = []
    for place, (question, answer) in enumerate(turns):
        prompt = PROMPTS.answer_text("chat", text, question)
        said.append(turn("user", prompt if place == 0 else f"Q: {question}"))
        said.append(turn("assistant", answer))
    return "".join(said)


def asked(passage: Passage, asks: list[tuple[str, str, Wording, str]]) -> str:
    """(sentence, kind, wording of the prompt, question) of one passage."""
    said = []
    shown = PROMPTS.shown(passage, passage.text)
    for place, (sentence, kind, wording, question) in enumerate(asks):
        prompt = PROMPTS.ask("chat", passage, sentence, kind, wording)
        line = prompt.removeprefix(shown).lstrip().partition("\n")[0]  # the sentence, as this prompt introduces it
        said.append(turn("user", prompt if place == 0 else f"{line}\n{PROMPTS.kinds[kind]}"))
        said.append(turn("assistant", f"Q: {question}"))
    return "".join(said)


def known(turns: Turns) -> str:
    """Questions without any text in view."""
    return "".join(turn("user", PROMPTS.closed("chat", q)) + turn("assistant", a) for q, a in turns)
