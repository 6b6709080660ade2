"""A tokenizer, opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import TokenizerError, foreign_failures
from qlora.model.tokenizer_check import check_tokenizer
from qlora.third_party import unprinted_panics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer that opens may fail over its first text: letters, digits, signs, spaces, line breaks, other scripts.
PROBE = "It's 3.14, naïve – 日本 \U0001f680\n\n  x = [1, 20]  \t\r\n"


def open_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, a private copy of its files (`TokenizerFiles.placed`); `name` is whose it is.

    Without a padding token it gets one (padding is known by its position, never by this id). Raises TokenizerError.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder, name)
    with foreign_failures() as failure, unprinted_panics():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(PROBE)
    if failure.error:
        what = f"{name}: its tokenizer cannot be opened ({failure.reason})"
        hint = "the base's folder needs tokenizer.json (or tokenizer.model) and its config"
        raise TokenizerError(what, hint) from failure.error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
