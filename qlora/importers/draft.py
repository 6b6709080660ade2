"""A recipe in the making, and what became of each key of the configuration that it is made of.

A key is carried, or as we do it anyway, or left: with the reason, never in silence. What a configuration does not set
has its own trainer's default, and where that differs from ours and changes what is learned, it is carried too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora import shown
from qlora.redaction import redact

Fate = Literal["carried", "ours", "left"]
# Not pad_token and its like, which are tokens of a vocabulary.
_SECRET = re.compile(
    r"(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)token$|secret|passw(or)?d|passphrase|(api|access|private)[_-]?key|credential",
    re.IGNORECASE,
)
_SHOWN = 60


@dataclass(frozen=True)
class Account:
    """What became of one key: `said` is our key with its value, or the reason."""

    fate: Fate
    key: str
    said: str


@dataclass
class Draft:
    """`values` are by our `table.key`; `sources` and `eval_sources` are tables of rows. `folder` is the file's."""

    trainer: str
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    eval_sources: list[dict[str, Any]] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # by our key: theirs
    of_defaults: bool = False  # whether what follows is not set, and is its trainer's default

    def carry(self, key: str, to: str, value: Any, note: str = "") -> None:
        if self.of_defaults and to in self.values:
            return  # another key has decided it
        self.values[to] = value
        note = "not set: its default" if self.of_defaults else note
        self.notes[to] = f"{shown.one_line(key)[:_SHOWN]}{f' ({note})' if note else ''}"
        self.accounts.append(Account("carried", key, f"{to} = {toml(value)}{f' ({note})' if note else ''}"))

    def note(self, key: str, said: str) -> None:
        """Carried, into more than one key of ours."""
        self.accounts.append(Account("carried", key, said))

    def ours(self, key: str, why: str) -> None:
        if not self.of_defaults:
            self.accounts.append(Account("ours", key, why))

    def leave(self, key: str, value: Any, why: str) -> None:
        self.accounts.append(Account("left", f"{key} = {as_shown(key, value)}", why))


Rule = Callable[[Draft, str, Any], None]
Rules = Mapping[str, Rule]


def toml(value: Any) -> str:
    """A plain value as TOML writes it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = shown.one_line(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{toml(str(key))} = {toml(item)}' for key, item in value.items())} }}"
    return repr(value)


def as_shown(key: str, value: Any) -> str:
    """Another's value on a line of its own, short, and nothing of what may be a secret: of a table, its keys."""
    if value and _SECRET.search(key):
        return "…"
    if isinstance(value, Mapping):
        text = f"{{{', '.join(map(str, value))}}}"
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        text = f"{len(value):,} tables"
    else:
        text = value if isinstance(value, str) else repr(value)
    text = shown.one_line(redact(text))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# --- rules ----------------------------------------------------------------------------------------------------------


def ours(why: str) -> Rule:
    """For a key whose every value comes to what we do."""
    return lambda draft, key, value: draft.ours(key, why)


def left(why: str) -> Rule:
    """For a key that has no counterpart, whatever its value."""
    return lambda draft, key, value: draft.leave(key, value, why)


def off(why: str) -> Rule:
    """For a switch that has no counterpart when it is on."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in (False, 0, "none", "no", "false"):
            draft.ours(key, "off, as here")
        else:
            draft.leave(key, value, why)

    return rule


def carried(to: str, convert: Callable[[Any], Any], note: str = "") -> Rule:
    """For a key that is one of ours under another name; `convert` raises ValueError for what it cannot be."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        try:
            draft.carry(key, to, convert(value), note)
        except ValueError as error:
            draft.leave(key, value, f"{to}: {error}")

    return rule
