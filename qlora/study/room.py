"""What a study takes: keys and values of the prompts that are answered at once, and labels on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora.study.answer import ANSWER_TOKENS
from qlora.study.labels import COLUMNS
from qlora.study.teacher import AT_ONCE

LABEL_BYTES = 4 + COLUMNS * (4 + 2)  # of a token: its id, and of each of the likeliest its id and log-probability
PROMPT_TOKENS = 96  # around a passage: the words of a prompt, headings, a question


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


def room(config: Any, passage_tokens: int, questions: int, free_bytes: int | None) -> Room:
    """Of `questions` about passages, with `free_bytes` beside the weights (None: not known)."""
    one = kv_bytes(config, passage_tokens + PROMPT_TOKENS + ANSWER_TOKENS)
    fitting = AT_ONCE if free_bytes is None else free_bytes // max(one, 1)
    at_once = max(1, min(AT_ONCE, fitting))
    return Room(at_once, at_once * one, questions * ANSWER_TOKENS * LABEL_BYTES)
