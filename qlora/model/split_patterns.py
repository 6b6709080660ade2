"""Patterns by which a tokenizer cuts text: whether matching one could take for ever.

They run in the engine of the library tokenizers (Oniguruma), which backtracks; no other one reads them all.
"""

from __future__ import annotations

import math

_FEW = 16  # repetitions: `\p{N}{1,3}` and its like have few ways


def repeats_repeated(pattern: str) -> bool:
    """Whether a group that repeats something without bound is itself repeated, as in `(a+)+`.

    Such a pattern may try exponentially many ways, and tokenizers' engine (Oniguruma) tries ten million at each place
    before it gives up. Patterns of real tokenizers repeat classes and single signs.
    """
    inner = [False]  # of each open group, whether something inside is repeated
    at, closed = 0, False  # closed: the group that ended just before `at` repeats something inside
    while at < len(pattern):
        sign = pattern[at]
        if sign == "\\":
            at = _behind_escape(pattern, at)
        elif sign == "[":
            at = _behind_class(pattern, at)
        elif sign == "(":
            inner.append(False)
            at += 1
        elif sign == ")":
            closed = inner.pop() if len(inner) > 1 else inner[-1]
            inner[-1] |= closed
            at += 1
            continue
        elif (found := _repetition(pattern, at)) is not None:
            end, most = found
            if closed and most > 1:
                return True
            inner[-1] |= most > _FEW
            at = end
        else:
            at += 1
        closed = False
    return False


def _repetition(pattern: str, at: int) -> tuple[int, float] | None:
    """Of a quantifier at this place: where it ends, and how often it may repeat. None where there is none."""
    if pattern[at] in "*+?":
        return at + 1, 1 if pattern[at] == "?" else math.inf
    if pattern[at] != "{" or (end := pattern.find("}", at)) < 0:
        return None
    least, comma, most = pattern[at + 1 : end].partition(",")
    if not (least + most).isdigit() or len(least + most) > 12:
        return None
    return end + 1, int(most) if most else math.inf if comma else int(least)


def _behind_escape(pattern: str, at: int) -> int:
    """`\\p{…}` and `\\x{…}` are one sign."""
    named = pattern[at + 1 : at + 3] in ("p{", "P{", "x{", "o{", "k{")
    return pattern.find("}", at) + 1 or len(pattern) if named else at + 2


def _behind_class(pattern: str, at: int) -> int:
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at = _behind_escape(pattern, at)
            continue
        depth += {"[": 1, "]": -1}.get(pattern[at], 0)
        at += 1
        if depth == 0:
            break
    return at
