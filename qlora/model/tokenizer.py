"""A base's tokenizer: opened, copied file by file as it is, and known again by its content."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qlora import disk
from qlora.errors import TokenizerError, foreign_failures
from qlora.model.tokenizer_check import check_tokenizer
from qlora.third_party import unprinted_panics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Copied as they are: transformers 5 rewrites tokenizer files so that other tools cannot read them (tokenizer.model is
# dropped, the class becomes one that 4.x refuses).
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# A tokenizer that opens may fail over its first text: letters, digits, signs, spaces, line breaks, other scripts.
PROBE = "It's 3.14, naïve – 日本 \U0001f680\n\n  x = [1, 20]  \t\r\n"


def open_tokenizer(folder: Path, name: str, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base `name` in `folder`, or of an adapter's folder that has another one (new tokens).

    Without a padding token it gets one (padding is known by its position, never by this id). Raises TokenizerError.
    """
    from transformers import AutoTokenizer

    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    if adapter is not None and own and tokenizer_fingerprint(adapter) != tokenizer_fingerprint(folder):
        folder, name = adapter, str(adapter)
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


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the tokenizer files of a folder, names and contents: what the tokens of a row depend on."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return disk.sha256_text(*(part for name in present for part in (name, disk.sha256_file(folder / name))))


def copy_tokenizer(source: Path, target: Path, template: str | None) -> None:
    """The base's tokenizer files, unchanged; the chat template beside them where the base has none of its own."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if template is not None and not has_template(source):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def has_template(folder: Path) -> bool:
    """Whether a tokenizer folder brings a chat template in one of the three places that transformers reads."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
