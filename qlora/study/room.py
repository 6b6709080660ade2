"""What a study takes: keys and values of the prompts that are answered at once, and labels on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora.data.documents.chunks import unique_passages
from qlora.errors import DataError
from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.study import amount, defaults, material
from qlora.study.answer import ANSWER_TOKENS
from qlora.study.ask import QUESTION_TOKENS
from qlora.study.exam import MAX_TOKENS, RETRIEVED
from qlora.study.exam_asking import AT_ONCE as EXAM_AT_ONCE
from qlora.study.labels import COLUMNS
from qlora.study.teacher import AT_ONCE

LABEL_BYTES = 4 + COLUMNS * (4 + 2)  # of a token: its id, and of each of the likeliest its id and log-probability
UNREAD_TOKENS = 320  # the same with worked examples, where no tokenizer is at hand: 700 characters, 350 Chinese ones
PROMPT_TOKENS = 96  # around a passage: the words of a prompt, headings, a question

Batches = tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]


@dataclass(frozen=True)
class Room:
    """`at_once` prompts are answered together, whose keys and values take `kv_bytes`; labels take `disk_bytes`."""

    at_once: int
    kv_bytes: int
    disk_bytes: int

    def told(self) -> str:
        sizes = f"keys and values of {self.at_once} answers at once {self.kv_bytes / 2**20:,.0f} MiB"
        return f"{sizes}, labels up to {self.disk_bytes / 2**20:,.0f} MiB on the disk"


def kv_bytes(config: Any, tokens: int) -> int:
    """Keys and values of `tokens` tokens in bf16, in every layer as if none had a window."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * int(config.num_hidden_layers) * int(heads) * int(width) * tokens


def room(config: Any, passage_tokens: int, questions: int, free_bytes: int | None, thoughts: int = 0) -> Room:
    """Of `questions` about passages, with `free_bytes` beside the weights (None: not known); before an answer stand
    `thoughts` tokens at most."""
    one = kv_bytes(config, passage_tokens + PROMPT_TOKENS + thoughts + ANSWER_TOKENS)
    fitting = AT_ONCE if free_bytes is None else free_bytes // max(one, 1)
    at_once = max(1, min(AT_ONCE, fitting))
    return Room(at_once, at_once * one, questions * ANSWER_TOKENS * LABEL_BYTES)


def batches(passage_tokens: int, around: int, at_once: int = AT_ONCE, thoughts: int = 0) -> Batches:
    """By phase, what is asked at once at most: rows, shared and own tokens of a prompt, tokens of an answer, logits.

    `passage_tokens` of a passage in view, `around` of the rest of a prompt. An exam shows other passages to each row.
    Labels are of the answers alone, which `thoughts` tokens were cut from.
    """
    study = (
        (at_once, passage_tokens + around, QUESTION_TOKENS, thoughts + ANSWER_TOKENS, 0),
        (at_once, 0, around + QUESTION_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS + 1),
    )
    retrieved = RETRIEVED * passage_tokens + around + QUESTION_TOKENS
    return ("study", study), ("exam", ((min(at_once, EXAM_AT_ONCE), 0, retrieved, thoughts + MAX_TOKENS, 0),))


class Foreseen(NamedTuple):
    """The recipe with what its documents ask for, what their study asks at once, and what is known of them."""

    recipe: Recipe
    asks: Batches
    documents: amount.Documents | None


def foreseen(recipe: Recipe, sink: Sink) -> Foreseen:
    """What is known where no tokenizer is at hand. Documents that are not here are taken for few pages, which a notice
    says."""
    if not recipe.data.documents:
        return Foreseen(recipe, (), None)
    known = None
    try:
        recipe, found = material.read(recipe, not defaults.has_length(recipe), sink)
        if found is not None:
            limit = recipe.study.passage_tokens
            passages, _ = unique_passages(found.documents.documents, _tokens_by_characters, limit)
            known = amount.Documents.of(passages)
    except DataError as error:
        sink.emit(Notice("documents", f"not read for this estimate: {error.what}"))
        recipe = defaults.unread(recipe, sink)
    return Foreseen(recipe, batches(recipe.study.passage_tokens, UNREAD_TOKENS), known)


def _tokens_by_characters(text: str) -> int:
    return -(-len(text) // amount.CHARS_A_TOKEN)
