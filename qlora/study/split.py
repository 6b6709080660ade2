"""What is learnt, and what is kept for the exam: decided before the rows are written, by hashes, never by order.

The exam comes first: for each fact that it asks about, a question by another prompt and seed; training questions that
are near one of its questions leave. Which sentences are left out is decided before anything is asked. Both follow from
the texts and the seed alone, so that a killed study decides the same when it goes on, and a change in one document
moves nothing in another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.study import metrics, words
from qlora.study.filters import Judged
from qlora.study.records import Candidate, key_of

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

NEAR = 0.5  # Jaccard of runs of five characters from which a training question gives an exam question away
SAME_FACT = 0.5  # F1 from which two answers about one sentence tell the same


@dataclass(frozen=True)
class Leak:
    """A training row that would give an exam question away. `exam` is that question's key."""

    candidate: Candidate
    exam: str
    reason: str

    def record(self) -> dict[str, Any]:
        """A line of dropped.jsonl."""
        return self.candidate.question.dropped(self.candidate.answer.text, self.reason, self.exam)


@dataclass(frozen=True)
class Split:
    """`train`: rows to learn. `hold`: rows that the base knows already, learnt too, to hold it where it is. `exam`: in
    other words, about facts of `train`. `left_out`: about sentences that nothing of `train` was asked about."""

    train: list[Candidate]
    hold: list[Candidate]
    exam: list[Candidate]
    left_out: list[Candidate]
    leaks: list[Leak]


def left_out(passages: Sequence[Passage], share: float, seed: int) -> frozenset[tuple[str, int]]:
    """Sentences that are never studied, as (Passage.key, place): about `share` of all, at least one of any.

    By a hash of the sentence: it is left out wherever it stands, and an edit elsewhere changes nothing.
    """
    drawn = {sentence: _draw(seed, "left out", sentence) for passage in passages for sentence in passage.sentences}
    if share <= 0 or not drawn:
        return frozenset()
    border = max(share, min(drawn.values()))
    return frozenset(
        (passage.key, at)
        for passage in passages
        for at, sentence in enumerate(passage.sentences)
        if drawn[sentence] <= border
    )


def split(judged: Judged, exam_questions: int, seed: int) -> Split:
    """At most `exam_questions` for the exam, one a sentence before a second of any; the rest is learnt."""
    by_purpose: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in judged.kept:
        by_purpose[candidate.question.purpose].append(candidate)
    fresh = {
        purpose: sorted(
            (c for c in by_purpose[purpose] if c.question.key not in judged.known),
            key=lambda candidate: _draw(seed, "exam", candidate.question.text),
        )
        for purpose in ("exam", "left_out")
    }
    outside, leaks = _without_told(by_purpose["train"], fresh["left_out"])
    choice = _Choice(outside, fresh["exam"])
    exam = choice.take(exam_questions)
    near = [Leak(outside[at], key, "near an exam question") for at, key in sorted(choice.gone.items())]
    learnt = [candidate for at, candidate in enumerate(outside) if at not in choice.gone]
    known = judged.known
    return Split(
        [candidate for candidate in learnt if candidate.question.key not in known],
        [candidate for candidate in learnt if candidate.question.key in known],
        exam,
        fresh["left_out"],
        [*leaks, *near],
    )


def near_pairs(train: Sequence[Candidate], exam: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Places of pairs (training, exam) whose questions are near each other and about the same numbers and names.

    By an index over the exam's runs of characters: the time grows with the rows, not with the pairs.
    """
    grams = [words.grams(candidate.question.text) for candidate in exam]
    about = [words.anchors(candidate.question.text, candidate.passage.language) for candidate in exam]
    owners: dict[str, list[int]] = defaultdict(list)
    for place, own in enumerate(grams):
        for gram in own:
            owners[gram].append(place)
    found = []
    for at, candidate in enumerate(train):
        text = candidate.question.text
        own, mine = words.grams(text), words.anchors(text, candidate.passage.language)
        shared = Counter(place for gram in own for place in owners.get(gram, ()))
        for place, count in sorted(shared.items()):
            union = len(own) + len(grams[place]) - count
            if count >= NEAR * union and about[place] == mine:
                found.append((at, place))
    return found


class _Choice:
    """Exam questions taken one after the other, so that each keeps a training row that tells its fact."""

    def __init__(self, train: Sequence[Candidate], offered: Sequence[Candidate]) -> None:
        self.offered = offered
        self.gone: dict[int, str] = {}  # place of a training row: the exam question that it is near
        self._near: dict[int, list[int]] = defaultdict(list)
        for at, place in near_pairs(train, offered):
            self._near[place].append(at)
        of_sentence: dict[tuple[str, int], list[int]] = defaultdict(list)
        for at, candidate in enumerate(train):
            of_sentence[candidate.question.passage, candidate.question.sentence].append(at)
        self._tell = {
            place: {
                at
                for at in of_sentence[candidate.question.passage, candidate.question.sentence]
                if same_fact(train[at], candidate)
            }
            for place, candidate in enumerate(offered)
        }
        self._taken: list[int] = []

    def take(self, count: int) -> list[Candidate]:
        """`count` questions, or as many as there are facts for."""
        asked: Counter[tuple[str, int]] = Counter()
        left = list(range(len(self.offered)))
        for most in range(1, len(left) + 1):
            before = len(left)
            for place in list(left):
                sentence = (self.offered[place].question.passage, self.offered[place].question.sentence)
                if len(self._taken) < count and asked[sentence] < most:
                    left.remove(place)
                    asked[sentence] += self._takes(place)
            if not left or len(self._taken) >= count or len(left) == before:
                break
        return [self.offered[place] for place in self._taken]

    def _takes(self, place: int) -> bool:
        """Take it, unless its own fact or that of one taken before would be left without a training row."""
        gone = {*self.gone, *self._near[place]}
        if not all(self._tell[other] - gone for other in [*self._taken, place]):
            return False
        if any(self._same_question(place, other) for other in self._taken):
            return False
        self.gone.update({at: self.offered[place].question.key for at in self._near[place] if at not in self.gone})
        self._taken.append(place)
        return True

    def _same_question(self, place: int, other: int) -> bool:
        one, two = (self.offered[at] for at in (place, other))
        return one.question.passage == two.question.passage and bool(near_pairs([one], [two]))


def same_fact(one: Candidate, other: Candidate) -> bool:
    """Whether the answers to two questions about one sentence tell the same."""
    a, b, language = one.answer.text, other.answer.text, one.passage.language
    return (
        metrics.contains(a, b, language)
        or metrics.contains(b, a, language)
        or metrics.token_f1(a, b, language) >= SAME_FACT
    )


def _without_told(train: Sequence[Candidate], hidden: Sequence[Candidate]) -> tuple[list[Candidate], list[Leak]]:
    """Training rows without those that tell a left-out fact: asked about another sentence of its passage, a base may
    have answered with the left-out one. What stands in the row's own sentence too is no such answer."""
    of_passage: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in hidden:
        of_passage[candidate.question.passage].append(candidate)
    kept, leaks = [], []
    for row in train:
        told = next((other for other in of_passage[row.question.passage] if _tells(row, other)), None)
        if told is None:
            kept.append(row)
        else:
            leaks.append(Leak(row, told.question.key, "tells a sentence that is left out"))
    return kept, leaks


def _tells(row: Candidate, hidden: Candidate) -> bool:
    fact, language = hidden.answer.text, row.passage.language
    own = row.passage.sentences[row.question.sentence]
    return metrics.contains(fact, row.answer.text, language) and not metrics.contains(fact, own, language)


def _draw(seed: int, purpose: str, text: str) -> float:
    """A number of 0 to 1 that follows from seed and text."""
    return int(key_of(seed, purpose, text)[:13], 16) / 16**13
