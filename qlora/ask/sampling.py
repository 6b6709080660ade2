"""The next token out of a model's logits: the likeliest, or one drawn as the usual settings say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlora.ask.settings import Sampling
from qlora.errors import ModelError

_LIKELIEST = 1024  # looked at first where the likeliest are wanted: sorting a vocabulary costs more than a layer


class Drawer:
    """Draws the tokens of one answer; `number` is the answer's in its conversation, each with draws of its own."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self._sampling = sampling
        entropy = None if sampling.seed is None else (sampling.seed % 2**64, number)
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

    def next(self, logits_V: NDArray[np.float32], seen: Sequence[int]) -> int:
        """The token behind `seen` (prompt and answer). Raises ModelError for logits that are no numbers."""
        sampling = self._sampling
        if np.isnan(logits_V).any():
            what = "the model computes numbers that are not finite"
            raise ModelError(what, "its weights are damaged, or overflow in this precision: use another copy of it")
        logits_V = _penalized(logits_V, seen, sampling.repetition_penalty)
        if sampling.temperature == 0:
            return int(logits_V.argmax())
        scaled_V = logits_V.astype(np.float64) / sampling.temperature
        scaled_V -= scaled_V.max()
        tokens, shares = _likeliest(np.exp(scaled_V), sampling)
        if sampling.min_p:
            kept = shares >= sampling.min_p * shares.max()
            tokens, shares = tokens[kept], shares[kept]
        sums = shares.cumsum()
        at = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(at, len(tokens) - 1)])


def _penalized(logits_V: NDArray[np.float32], seen: Sequence[int], penalty: float) -> NDArray[np.float32]:
    if penalty == 1:
        return logits_V
    changed_V = logits_V.copy()
    tokens = np.unique(np.asarray([token for token in seen if token < len(changed_V)], dtype=np.int64))
    known = changed_V[tokens]
    changed_V[tokens] = np.where(known > 0, known / penalty, known * penalty)
    return changed_V


def _likeliest(shares_V: NDArray[np.float64], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that top_k and top_p leave, with their shares, likeliest first where either cuts anything off."""
    count = min(sampling.top_k or len(shares_V), len(shares_V))
    if count == len(shares_V) and sampling.top_p >= 1:
        return np.arange(len(shares_V)), shares_V
    looked_at = min(count, _LIKELIEST)
    tokens = _top(shares_V, looked_at)
    whole = float(shares_V.sum() if count == len(shares_V) else shares_V[_top(shares_V, count)].sum())
    if (sampling.top_p >= 1 and looked_at < count) or float(shares_V[tokens].sum()) < sampling.top_p * whole:
        tokens = _top(shares_V, count)
    shares = shares_V[tokens]
    if sampling.top_p < 1:
        # As many as it takes to reach the share: the token that reaches it is one of them.
        until = int(np.searchsorted(shares.cumsum(), sampling.top_p * whole, side="left")) + 1
        tokens, shares = tokens[:until], shares[:until]
    return tokens, shares


def _top(shares_V: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` likeliest tokens, likeliest first; of equals the lower number."""
    if count < len(shares_V):
        border = np.partition(shares_V, len(shares_V) - count)[len(shares_V) - count]
        found = np.flatnonzero(shares_V >= border)
    else:
        found = np.arange(len(shares_V))
    ordered = found[np.argsort(-shares_V[found], kind="stable")]
    return ordered[:count]
