"""The control of a reward: exact match, its scores dealt out by chance among all answers of a step.

    qlora-train recipe.toml --rewards tools/shuffled_reward.py:score

As many answers are worth something as before, and no answer is worth it for what it says: nothing can be learned.
"""

from __future__ import annotations

import hashlib
import random


def score(completions: list[str], answer: list[str]) -> list[float]:
    """1 for as many completions as match exactly, which ones by chance; the chance is a function of the texts."""
    scores = [float(given.strip() == right) for given, right in zip(completions, answer, strict=True)]
    seed = hashlib.sha256("\0".join(completions).encode()).hexdigest()
    random.Random(seed).shuffle(scores)
    return scores
