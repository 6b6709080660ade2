"""Redaction: tokens and passwords taken out of everything that is shown, logged or written.

A secret is known by its value (whatever the environment holds under a name such as HF_TOKEN or WANDB_API_KEY, and the
token that `hf auth login` stored) or by its form (hub tokens, Authorization headers, passwords in addresses).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
SHORTEST = 8  # a shorter value would stand in ordinary text by chance
MAX_TOKEN_FILE_BYTES = 4096

_NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY)", re.IGNORECASE)
_PLACES = ("_PATH", "_FILE", "_DIR")  # variables that say where a secret lies, as HF_TOKEN_PATH does
_FORMS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),  # OpenAI and others
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}"),  # GitHub
    re.compile(r"\bAKIA[A-Z0-9]{16}\b"),  # AWS
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)(?<=authorization: )(?!bearer)\S+(?: \S{8,})?"),
    # user:password in an address, and in one that was taken for a path, which has lost a slash
    re.compile(r"(?<=[a-z]:/)(?<!\b[a-z]:/)/?[^/\s:@]*:[^/\s:@]+(?=@)", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text without any secret."""
    if len(text) < SHORTEST:
        return text
    for value in values():
        text = text.replace(value, HIDDEN)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


def redact_all(value: Any) -> Any:
    """A value of plain types with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, tuple | list):
        return type(value)(redact_all(item) for item in value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    return value


def values() -> tuple[str, ...]:
    """Secret values of this process, longest first: one may be part of another."""
    values = {value for name, value in os.environ.items() if _NAMES.search(name) and not name.endswith(_PLACES)}
    values |= set(_stored_token(*map(os.environ.get, ("HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"))))
    return tuple(sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True))


@lru_cache(4)
def _stored_token(token_path: str | None, hub_home: str | None, cache: str | None) -> tuple[str, ...]:
    """What `hf auth login` stored, where huggingface_hub's own constants.py looks for it."""
    home = hub_home or os.path.join(cache or os.path.join("~", ".cache"), "huggingface")
    # os.path's own leaves a `~` that means no home as it is, and raises nothing: this runs while errors are shown.
    file = Path(os.path.expandvars(os.path.expanduser(token_path or os.path.join(home, "token"))))
    try:
        if not file.is_file() or file.stat().st_size > MAX_TOKEN_FILE_BYTES:
            return ()
        return (file.read_text(encoding="utf-8", errors="ignore").strip(),)
    except (OSError, ValueError):  # a NUL in its name
        return ()
