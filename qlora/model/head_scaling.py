"""Keys of a configuration that scale or cap a model's logits: which of them nobody reads, and how they are named.

What transformers' own classes do with the keys that they declare is compared operation by operation (`family_facts`).
A key that its class does not declare is read by no one: the model was made by other code, whose logits are others.
"""

from __future__ import annotations

import re
from typing import Any

from qlora.shown import one_line

HINT = "use a base of another architecture, or a copy of this one that transformers itself computes, and report it"
_SCALES = re.compile(r"logit|soft_?cap|(head|output)_(mult|scal)|(^|_)mup(_|$)|width_mult")
# Of attention, of routers and of losses, how many logits are kept or returned: none of it changes a token's logit.
_ELSEWHERE = re.compile(r"att|mlp|router|query|key|expert|moe|gate|loss|keep|output_.*logits|classif|jitter|init")


def unread_key(text: Any) -> str:
    """The first key that would scale or cap logits and that transformers' class does not declare; "" where none is.

    `text` is transformers' configuration, with all that config.json holds.
    """
    declared = type(text)().to_dict().keys() | {*getattr(text, "attribute_map", {})}
    for key, value in _scaling(text):
        if key not in declared:
            return f"config.json: {one_line(key)} = {value:g} scales or caps logits, which a {text.model_type} does not"
    return ""


def reason(text: Any) -> str:
    """Why our loss is not that of a model whose own forward computes other logits."""
    keys = ", ".join(f"{key} = {value:g}" for key, value in _scaling(text))
    what = f"{text.model_type}: its forward does something to its logits that is not known here"
    return f"{what} ({keys})" if keys else what


def _scaling(text: Any) -> list[tuple[str, float]]:
    """Keys by their names, and values that are not neutral."""
    return [
        (key, float(value))
        for key, value in vars(text).items()
        if _SCALES.search(key.lower()) and not _ELSEWHERE.search(key.lower())
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1)
    ]
