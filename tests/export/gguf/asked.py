"""Helpers of the tests of vocabularies: tokenizers read, changed, and compared with llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora.export.gguf.metadata import Entry
from qlora.export.gguf.vocab import Vocab, read_vocab
from tests.export.gguf.oracle import ask, write_vocab_only

PADDING_ROWS = 7


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read(folder: Path, **settings: Any) -> Vocab:
    return read_vocab(folder, len(load(folder)) + PADDING_ROWS, **settings)


def differing(
    folder: Path, entries: Sequence[Entry], texts: Sequence[str], *, add_special: bool = True, name: str = "tiny"
) -> list[str]:
    """The texts that llama.cpp, given these keys, tokenizes otherwise than transformers."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's tokenizer is asked")
    answer = ask(write_vocab_only(folder / "vocab.gguf", entries, name), texts, add_special=add_special)
    tokenizer = load(folder)
    wanted = [tokenizer(text, add_special_tokens=add_special)["input_ids"] for text in texts]
    return [text for text, ours, theirs in zip(texts, wanted, answer["ids"], strict=True) if ours != theirs]


def without(entries: Sequence[Entry], *keys: str) -> list[Entry]:
    dropped = {f"tokenizer.ggml.{key}" for key in keys}
    assert dropped <= {entry.key for entry in entries}
    return [entry for entry in entries if entry.key not in dropped]


def changed(folder: Path, file: str, **fields: Any) -> Path:
    """The folder with these fields in one of its JSON files."""
    path = folder / file
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**found, **fields}), encoding="utf-8")
    return folder


def with_added(folder: Path, *tokens: dict[str, Any]) -> Path:
    """The folder with these entries behind the added tokens of its tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return changed(folder, "tokenizer.json", added_tokens=[*content["added_tokens"], *tokens])
