"""A tokenizer, opened."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qlora import files
from qlora.errors import TokenizerError, foreign_failures
from qlora.model.tokenizer_check import check_tokenizer
from qlora.third_party import unprinted_panics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer that opens may fail over its first text: letters, digits, signs, spaces, line breaks, other scripts.
PROBE = "It's 3.14, naïve – 日本 \U0001f680\n\n  x = [1, 20]  \t\r\n"


# Modules, with the packages that bring them, that read a vocabulary which is no tokenizer.json.
_NEEDED = {
    "*.model": {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
    "*.tiktoken": {"tiktoken": "tiktoken"},
    "tekken.json": {"mistral_common": "mistral-common"},
}
_BEGINNING_BYTES = 200
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # base64 and rank, as in Llama 3's tokenizer.model


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
        if missing := missing_packages(folder):
            file, packages = missing
            what = (
                f"{name}: its tokenizer is {file} alone, and the installation lacks {' and '.join(packages)} to read it"
            )
            hint = f"pip install {' '.join(packages)}, or use a base with a tokenizer.json"
            raise TokenizerError(what, hint) from failure.error
        what = f"{name}: its tokenizer cannot be opened ({failure.reason})"
        hint = "the base's folder needs tokenizer.json (or tokenizer.model) and its config"
        raise TokenizerError(what, hint) from failure.error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def missing_packages(folder: Path) -> tuple[str, list[str]] | None:
    """(file, packages) where a tokenizer has no tokenizer.json, and its file needs packages that are not installed.

    transformers asks for tiktoken whatever it lacks (tokenization_utils_tokenizers.py), which opens no SentencePiece.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    names = sorted(path.name for path in folder.iterdir())
    for pattern, modules in _NEEDED.items():
        for name in (name for name in names if fnmatch(name, pattern)):
            if pattern == "*.model" and _TIKTOKEN_LINE.match(_beginning(folder / name)):
                modules = _NEEDED["*.tiktoken"]
            packages = [package for module, package in modules.items() if not _is_installed(module)]
            return (name, packages) if packages else None
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is not there
        return False


def _beginning(file: Path) -> bytes:
    with files.open_to_read(file) as opened:
        return opened.read(_BEGINNING_BYTES)
