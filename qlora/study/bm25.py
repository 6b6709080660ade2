"""Search over all passages: BM25 with a sparse index, for what stands alone and for the columns with retrieval.

score(q, d) = sum over the query's terms of idf(t) · tf · (k1 + 1) / (tf + k1 · (1 − b + b · |d| / mean |d|)), with
idf(t) = ln(1 + (N − n + 0.5) / (n + 0.5)) (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework",
section 3; the 1 inside keeps terms of more than half of the passages above 0, as Lucene's BM25Similarity does).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qlora.study import words

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

# Robertson and Zaragoza 2009, section 3.5: 1.2 < k1 < 2 and 0.5 < b < 0.8 are good for many collections; these two are
# Lucene's defaults.
K1 = 1.2
B = 0.75
_RUN = re.compile(f"[{words.UNSPACED}]+")


def terms(text: str, language: str) -> list[str]:
    """What is searched for: tokens, and pairs of characters where a language has no blanks between words.

    A single such character is a term only where it stands alone: pairs find words of Chinese about as well as a
    dictionary does (Nie et al. 2000).
    """
    found = []
    at = 0
    for run in _RUN.finditer(text):
        found += words.tokens(text[at : run.start()], language)
        signs = run[0]
        found += [signs[i : i + 2] for i in range(len(signs) - 1)] or [signs]
        at = run.end()
    return found + words.tokens(text[at:], language)


class Index:
    """Passages by their terms. It holds eight bytes for each different term of each passage, and each term once."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        """`texts` are pairs of text and language, in the order by which passages are named."""
        self._ids: dict[str, int] = {}
        owners, places, counts, lengths = array("i"), array("i"), array("i"), array("i")
        for place, (text, language) in enumerate(texts):
            found = Counter(terms(text, language))
            lengths.append(found.total())
            for term, count in found.items():
                owners.append(self._ids.setdefault(term, len(self._ids)))
                places.append(place)
                counts.append(count)
        self.size = len(lengths)
        owner_P = np.frombuffer(owners, dtype=np.int32) if owners else np.zeros(0, np.int32)
        order = np.argsort(owner_P, kind="stable")
        self._places_P = np.asarray(places, dtype=np.int32)[order]
        holding_T = np.bincount(owner_P, minlength=len(self._ids))
        self._starts = np.concatenate(([0], np.cumsum(holding_T)))
        idf_T = np.log(1 + (self.size - holding_T + 0.5) / (holding_T + 0.5))
        length_D = np.asarray(lengths, dtype=np.float64)
        slack_D = K1 * (1 - B + B * length_D / max(1.0, float(length_D.mean()) if self.size else 1.0))
        tf_P = np.asarray(counts, dtype=np.float64)[order]
        weights_P = idf_T[owner_P[order]] * tf_P * (K1 + 1) / (tf_P + slack_D[self._places_P])
        self._weights_P = weights_P.astype(np.float32)

    def scores(self, query: str, language: str) -> NDArray[np.float64]:
        """The score of every passage (N,). Words that say nothing by themselves are not looked for: in a few passages
        "does" and "it" would find one as well as another."""
        total_N, stop = np.zeros(self.size), words.words_of(language).stop
        for term, count in sorted(Counter(terms(query, language)).items()):
            at = self._ids.get(term)
            if at is not None and term not in stop:
                chosen = slice(self._starts[at], self._starts[at + 1])
                total_N[self._places_P[chosen]] += count * self._weights_P[chosen]
        return total_N

    def best(self, query: str, language: str, count: int) -> list[int]:
        """Places of the `count` passages that answer best, best first; of equal ones the first. None without a hit."""
        total_N = self.scores(query, language)
        hits = np.flatnonzero(total_N > 0)
        if len(hits) > count:  # whatever is as good as the last of them stays, so that equals are taken in order
            least = np.partition(total_N[hits], len(hits) - count)[len(hits) - count]
            hits = hits[total_N[hits] >= least]
        order = np.lexsort((hits, -total_N[hits]))
        return [int(place) for place in hits[order][:count]]


class Search:
    """Passages, found by question."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self.index = Index((passage.text, passage.language) for passage in passages)

    def best(self, question: str, language: str, count: int) -> list[Passage]:
        """The passages that answer best, best first; of passages that say the same, one."""
        places = self.index.best(question, language, 2 * count)
        found = list({self.passages[place].key: self.passages[place] for place in places}.values())
        return found[:count]
