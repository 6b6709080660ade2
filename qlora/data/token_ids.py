"""Tokens that the embedding has no row for: a tokenizer may know more of them than its model.

Community models add a pad token, or tokens of a chat template, without making the embedding larger. Such an id ends
training with an IndexError once the model is loaded; here it is found when the rows are tokens, before weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qlora.errors import TokenizerError
from qlora.events import Notice, Sink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora.data.prepare import PreparedData


def check_ids(
    tokenizer: PreTrainedTokenizerBase, data: PreparedData, prompts: Iterable[Sequence[int]], rows: int, base: str
) -> None:
    """Raises TokenizerError for a token of a row or a prompt that is none of the `rows` of the embedding of `base`."""
    hint = "take that token out of rows and template, or use a base that was made with it"
    for split in (data.train, data.eval):
        if found := split.first_above(rows - 1):
            raise TokenizerError(f"{found[0]}: {_without_embedding(tokenizer, found[1], rows, base)}", hint)
    for prompt in prompts:
        if (token := max(prompt, default=0)) >= rows:
            what = f"the chat template's prompt: {_without_embedding(tokenizer, token, rows, base)}"
            raise TokenizerError(what, hint)


def say_stray_padding(tokenizer: PreTrainedTokenizerBase, rows: int, base: str, sink: Sink) -> None:
    """A notice where the tokenizer's pad token has no embedding. Training needs none; batches of others do."""
    if (pad := tokenizer.pad_token_id) is not None and pad >= rows:
        message = f"the pad {_without_embedding(tokenizer, pad, rows, base)[len('the ') :]}: training pads with another"
        more = "whoever serves the model in batches sets pad_token to its end token"
        sink.emit(Notice("tokenizer", f"{message}; {more}"))


def _without_embedding(tokenizer: PreTrainedTokenizerBase, token: int, rows: int, base: str) -> str:
    name = tokenizer.convert_ids_to_tokens(token)
    return f"the token {name!r} ({token}) has no embedding in {base}, which has {rows:,}"
