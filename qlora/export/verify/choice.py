"""Which of two bases an export is merged on: the one whose loss on the run's evaluation rows is better, if any is.

Merged on the base as training held it, a model is nearer to the trained one; merged on the original weights, it may
answer better than that (what 4 bit had taken away comes back) or worse. Both are measured at the same positions of the
same rows. Where the difference of their losses is beyond chance, the better one is taken. Else, and where the rows are
too few to tell, the nearer one is, by KL. The rows have been seen by that choice: their loss is no longer what rows
that nobody has looked at would show, which is said wherever it is shown.

Chance is the percentile interval of the bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13) for the mean difference a token. Rows are drawn, not tokens, since the tokens of an answer depend on each
other; both bases on the same rows, since most of what differs is between the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qlora.export.merge.parts import MergeBase
from qlora.export.verify.fidelity import EVALUATION_ROWS, Positions

RESAMPLES = 10_000  # 1,000 are usual for an interval; with ten times as many the seed hardly moves its ends
CONFIDENCE = 0.95
LEAST_ROWS = 20  # of fewer, the interval of a mean holds it less often than it says
_DRAWN_AT_ONCE = 1 << 22  # row numbers; 32 MiB


@dataclass(frozen=True)
class MeasuredBase:
    """A merge base as it was measured: mean KL to the trained model, and the loss at each position (N,), in nats."""

    kl: float
    losses_N: Tensor


@dataclass(frozen=True)
class Choice:
    """The base that was taken, and why. Losses are in nats a token, by base; `kl` too.

    difference  loss of "full" less that of "nf4", on the `rows`
    interval    of that difference, at CONFIDENCE; None where the rows are too few
    by          "loss", "kl", or "asked" where the caller named it
    seen        whether the rows' losses have decided: they are then no measure of unseen rows
    """

    merge_base: MergeBase
    by: str
    kl: Mapping[str, float]
    loss: Mapping[str, float]
    rows: int
    source: str
    difference: float
    interval: tuple[float, float] | None
    confidence: float
    resamples: int
    seen: bool

    def in_words(self) -> str:
        """One sentence for people, figures of both."""
        each = "; ".join(f"on {base} KL {self.kl[base]:.2g}, loss {self.loss[base]:.4f}" for base in sorted(self.kl))
        if self.interval is None:
            chance = f"{self.rows:,} {self.source} are too few to tell their losses apart"
        else:
            low, high = self.interval
            chance = f"full less nf4 {self.difference:+.4f} nats a token, {self.confidence:.0%} of {self.resamples:,} "
            chance += f"resamples of the {self.rows:,} {self.source} between {low:+.4f} and {high:+.4f}"
        why = {
            "loss": "for its loss, a choice that has seen these rows",
            "kl": "as the nearer one",
            "asked": "as asked",
        }
        return f"merged {each} ({chance}): {self.merge_base} is taken, {why[self.by]}"


def choose(
    measured: Mapping[MergeBase, MeasuredBase], positions: Positions, asked: MergeBase | None, max_kl: float | None
) -> Choice:
    """The choice between the bases "nf4" and "full", both measured at `positions`.

    `asked` decides where it is given; a base beyond `max_kl` is taken only where the nearer one is beyond it too.
    """
    of_rows = [len(places) for _, places in positions.documents()]
    difference_N = (measured["full"].losses_N - measured["nf4"].losses_N).double().numpy()
    enough = positions.source == EVALUATION_ROWS and len(of_rows) >= LEAST_ROWS
    interval = paired_interval(difference_N, of_rows, _seed(positions)) if enough else None
    nearer = min(measured, key=lambda base: measured[base].kl)
    better: MergeBase = "full" if difference_N.mean() < 0 else "nf4"
    told = interval is not None and (interval[0] > 0 or interval[1] < 0)
    allowed = max_kl is None or measured[better].kl <= max_kl
    taken = asked or (better if told and allowed else nearer)
    return Choice(
        merge_base=taken,
        by="asked" if asked else "loss" if told and allowed else "kl",
        kl={base: found.kl for base, found in measured.items()},
        loss={base: float(found.losses_N.double().mean()) for base, found in measured.items()},
        rows=len(of_rows),
        source=positions.source,
        difference=float(difference_N.mean()),
        interval=interval,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        seen=not asked and told and allowed,
    )


def paired_interval(difference_N: np.ndarray, of_rows: Sequence[int], seed: int) -> tuple[float, float]:
    """The percentile interval of the mean difference a token; `of_rows` are the numbers of positions of each row.

    Deterministic: numpy keeps the stream of RandomState as it is.
    """
    counts_R = np.array(of_rows)
    ends_R = counts_R.cumsum()
    sums_R = np.add.reduceat(difference_N, ends_R - counts_R)
    random, means = np.random.RandomState(seed), []
    at_once = max(1, _DRAWN_AT_ONCE // len(counts_R))
    for start in range(0, RESAMPLES, at_once):
        drawn_BR = random.randint(0, len(counts_R), (min(at_once, RESAMPLES - start), len(counts_R)))
        means.append(sums_R[drawn_BR].sum(axis=1) / counts_R[drawn_BR].sum(axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _seed(positions: Positions) -> int:
    """Of the rows' own tokens: the same rows give the same interval."""
    content = hashlib.sha256()
    for ids, places in positions.documents():
        content.update(repr((ids, places)).encode())
    return int.from_bytes(content.digest()[:4], "little")
