"""Prompts on other things, answered by the base and trained as it answered: they keep the rest as it was.

They are data, `hold.toml`: in each language some tasks and some things to do them with. The exam's own neutral prompts
are others.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files as resources

from qlora import foreign_toml
from qlora.study.prompts import FALLBACK


def prompts(language: str, count: int, seed: int) -> tuple[str, ...]:
    """Up to `count` prompts in a language (English ones where it has none), in an order that follows from the seed."""
    table = foreign_toml.parse((resources("qlora.study") / "hold.toml").read_text(encoding="utf-8"))
    texts = table.get(language) or table[FALLBACK]
    made = [task.replace("{thing}", thing) for task in texts["tasks"] for thing in texts["things"]]
    made.sort(key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    return tuple(made[:count])
