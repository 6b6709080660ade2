"""The files of a base's tokenizer: copied as they are, and known again by their content."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora import disk

# Copied as they are: transformers 5 rewrites tokenizer files so that other tools cannot read them (tokenizer.model is
# dropped, the class becomes one that 4.x refuses).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


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
