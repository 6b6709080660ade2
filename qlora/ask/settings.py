"""How answers are drawn: the settings, by the field's names, and what each may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from qlora.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in the order of transformers: penalty, temperature, top_k, top_p, min_p.

    temperature         0: the likeliest token, and nothing is drawn
    top_p               the likeliest tokens that have this share of the probability together; 1: all (arXiv:1904.09751)
    top_k               so many of the likeliest; 0: all
    min_p               tokens of at least this share of the likeliest one's probability; 0: all (arXiv:2407.01082)
    repetition_penalty  of tokens that the prompt or the answer holds; 1: none (arXiv:1909.05858)
    max_tokens          of an answer
    seed                None: another answer each time
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int | None = None


# Least and most of each; OpenAI's temperature ends at 2, others' go further.
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 10.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "max_tokens": (1, 1_000_000),
    "seed": (-(2**63), 2**63 - 1),
}
_WHOLE = ("top_k", "max_tokens", "seed")
NAMES = tuple(field.name for field in fields(Sampling))


def changed(sampling: Sampling, **values: float | None) -> Sampling:
    """The settings with those of `values` that are not None. Raises UserError for one that is out of its bounds."""
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        least, most = BOUNDS[name]
        if not math.isfinite(value) or not least <= value <= most:
            raise UserError(f"{name} is {value:g}", f"it lies between {least:g} and {most:g}")
    return replace(sampling, **given)  # type: ignore[arg-type]


def changed_by_text(sampling: Sampling, name: str, text: str) -> Sampling:
    """The same, of a setting that somebody has typed; "none" for `seed` takes it back. Raises UserError."""
    if name not in NAMES:
        raise UserError(f"there is no setting {name!r}", f"settings are {', '.join(NAMES)}")
    if name == "seed" and text.lower() == "none":
        return replace(sampling, seed=None)
    try:
        value: float = int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        hint = f"write {kind}, such as {getattr(Sampling(), name) or 1}"
        raise UserError(f"{name}: {text!r} is not {kind}", hint) from None
    return changed(sampling, **{name: value})
