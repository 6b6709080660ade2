"""A base's tokenizer in another process of ours, without transformers: importing that takes 2 s and 250 MB in each.

It is the same engine (the library tokenizers) with the same settings, and what `ChatTokenizer` asks of a tokenizer. One
that does anything in Python beside the engine does not travel: its rows are tokenized where it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.data.known_words import KnownWords
from qlora.errors import foreign_failures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What an engine may do otherwise after it was written and read: both sides tokenize it, and compare.
_PROBE = "It's 3.14, naïve – 日本 \U0001f680\n\n  x = [1, 20]  \t\r\nSome words. More of them,\u00a0and so on"


@dataclass(frozen=True)
class _Added:
    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


def travelling(tokenizer: PreTrainedTokenizerBase, templates: Sequence[str]) -> dict[str, Any] | None:
    """A tokenizer as values of JSON, for `LightTokenizer`; None for one that does not travel.

    `templates`: its chat templates for conversations without and with tools, none where it has none.
    """
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    own = any(getattr(kind, name) is not getattr(plain, name) for name in ("__call__", "_encode_plus", "_decode"))
    if own or not _decodes_plainly(tokenizer):
        return None
    tokenizer([_PROBE], verbose=False)  # which takes away truncation and padding, as for any row
    engine = tokenizer.backend_tokenizer
    added = [[number, str(token), bool(token.special)] for number, token in tokenizer.added_tokens_decoder.items()]
    with foreign_failures() as failure:
        state = engine.to_str()
    if failure.error:
        return None
    return {
        "engine": state,
        "split_special": bool(engine.encode_special_tokens),
        "added": added,
        "names": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "eos": [None if tokenizer.eos_token is None else str(tokenizer.eos_token), tokenizer.eos_token_id],
        "bos_id": tokenizer.bos_token_id,
        "unk_id": tokenizer.unk_token_id,
        "templates": list(templates),
        "probe": _probed(engine),
    }


def _decodes_plainly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding is the engine's alone: transformers takes spaces out for some that are no BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return True
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not forced


def _probed(engine: Any) -> list[list[Any]]:
    encoded = engine.encode_batch([_PROBE], add_special_tokens=False)[0]
    return [list(encoded.ids), [list(pair) for pair in encoded.offsets], list(engine.encode(_PROBE).ids)]


class _Offsets(Sequence[tuple[int, int]]):
    """Characters from and to of each token, made when they are asked for: of a row's hundreds some ten are."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self._length = len(encoding)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._encoding.offsets)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int) and 0 <= at < self._length:
            return self._encoding.token_to_chars(at)
        return self._encoding.offsets[at]


class LightTokenizer:
    """A tokenizer that has travelled. Raises ValueError where its engine does not do here what it did there."""

    is_fast = True

    def __init__(self, state: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        with foreign_failures() as failure:
            self._engine = Tokenizer.from_str(state["engine"])
            self._engine.encode_special_tokens = state["split_special"]
            probed = json.loads(json.dumps(_probed(self._engine)))
        if failure.error or probed != state["probe"]:
            raise ValueError(f"the tokenizer is another one here ({failure.reason})" if failure.error else "it differs")
        self._words = KnownWords(self._engine, state["engine"])
        self._templates: list[str] = state["templates"]
        self.chat_template = self._templates[0] if self._templates else None
        self.added_tokens_decoder = {number: _Added(text, special) for number, text, special in state["added"]}
        self.special_tokens_map: dict[str, str] = state["names"]
        self.eos_token, self.eos_token_id = state["eos"]
        self.bos_token_id: int | None = state["bos_id"]
        self._unk_id: int | None = state["unk_id"]

    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """`input_ids`, and for a list of texts `offset_mapping`: characters from and to for each token."""
        if isinstance(texts, str):
            return {"input_ids": self._engine.encode(texts, add_special_tokens=add_special_tokens).ids}
        if not add_special_tokens and (known := self._words.encode(texts)) is not None:
            return {"input_ids": known[0], "offset_mapping": known[1]}
        encoded = self._engine.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded], "offset_mapping": [_Offsets(one) for one in encoded]}

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode(list(ids), skip_special_tokens=False))

    def get_chat_template(self, tools: Any = None) -> str:
        return self._templates[bool(tools)]

    def get_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        return vocab

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: number for number, token in self.added_tokens_decoder.items()}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str):
            number = self._engine.token_to_id(tokens)
            return self._unk_id if number is None else number
        return [self.convert_tokens_to_ids(token) for token in tokens]
