"""What a chat template makes of the answers that are trained, by kind, and how it is said: once, with counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora.events import Notice

# kind: (topic, what is said after the count)
_SAID = {
    "history": (
        "reasoning",
        "answers without their reasoning, which the template drops from history",
    ),
    "thoughts": (
        "reasoning",
        "answers are trained without their reasoning: the chat template does not write it, so that the model unlearns "
        "to think; model.chat_template may name a template that does",
    ),
    "shut": (
        "reasoning",
        "answers are trained without their reasoning: the prompt that is served shuts the block of thoughts",
    ),
    "empty block": (
        "reasoning",
        "answers have no reasoning: trained with an empty block of thoughts, as the template or the prompt begins it",
    ),
    "no block": (
        "reasoning",
        "answers are trained without the block of thoughts that a served prompt opens: the template writes history so",
    ),
    "inlined": (
        "reasoning",
        "answers have their reasoning put before them between <think> and </think>: the chat template reads no other",
    ),
    "words": (
        "template",
        "answers are trained without the words beside their tool call, which the chat template does not write",
    ),
    "calls": ("template", "answers are trained without some of their tool calls, which the chat template drops"),
    "rewritten": (
        "template",
        "answers are trained otherwise than they stand in the rows: the chat template alters them",
    ),
    "system": ("template", "system prompts are left out by the chat template, which has no place for them"),
    "long": (
        "template",
        "answers of very long conversations are not trained: each would need a row of its own, and one conversation is "
        "made into rows of 4 million characters in all",
    ),
    "unended": (
        "template",
        "answers are trained without an end: what the chat template writes after them in a conversation is not it",
    ),
}


def notices(counts: Mapping[str, int]) -> Iterator[Notice]:
    """A notice for each kind that was met, in a fixed order."""
    if split := counts.get("split"):
        made = f"{split} conversations became {counts.get('split rows', 0)} rows"
        why = "the chat template writes earlier answers otherwise than the model writes them when it is served"
        yield Notice("turns", f"{made}: {why}", split)
    for kind, (topic, words) in _SAID.items():
        if counts.get(kind):
            yield Notice(topic, f"{counts[kind]} {words}", counts[kind])
