"""Which of the base's questions and answers are worth learning: six filters, the cheapest first.

The first two need the question alone (`judge_questions`, before anything is answered), the others its answer too
(`judge`). Nothing is lost: what is dropped is kept with its reason and, where there is one, what gave the reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from qlora.events import Notice
from qlora.study import bm25, metrics, words
from qlora.study.records import Answer, Candidate, Question

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

Reason = Literal[
    "form", "language", "self reference", "foreign name", "ambiguous", "no answer", "cut", "ungrounded", "round trip",
    "unsure", "no gain", "twice",
]  # fmt: skip
SAID: Mapping[Reason, str] = {
    "form": "not one line of 4 to 40 words that ends in a question mark",
    "language": "not in the documents' language",
    "self reference": "speak of the text that they were asked about",
    "foreign name": "name something that their passage does not",
    "ambiguous": "stand for another passage as well",
    "no answer": "answered with nothing, or that the text does not say",
    "cut": "answers did not end",
    "ungrounded": "answers say what their passage does not",
    "round trip": "answered otherwise when asked again",
    "unsure": "answered with less than the probability of `study.sure`",
    "no gain": "as likely without the passage",
    "twice": "asked twice of one passage",
}
SHORTEST, LONGEST = 4, 40  # words of a question, or characters where there are no blanks
FOUND_AMONG = 3  # passages that BM25 finds first
GROUNDED = 0.8  # share of an answer's words that stand in its passage
AGREES = 0.6  # F1 of two readings (round trip of Alberti et al. 2019, arXiv 1906.05416, which wants them equal)
GAIN = 0.5  # nats a token by which the passage must make the answer likelier
SAME = 0.8  # Jaccard of runs of five characters (NeMo's decontamination takes 0.8, distilabel 0.9)
_PREFIX, _ENDING = 4, 3  # letters that two forms of a word share at least, and of a longer one those that may differ
_QUOTES = "\"'“”„»« "


@dataclass(frozen=True)
class Dropped:
    """A question that is not learnt. `answer` is None where it was dropped before it was answered."""

    question: Question
    answer: Answer | None
    reason: Reason
    detail: str = ""  # the number, name or other question that gave the reason

    def record(self) -> dict[str, Any]:
        """A line of dropped.jsonl."""
        return self.question.dropped(None if self.answer is None else self.answer.text, self.reason, self.detail)


@dataclass(frozen=True)
class Judged:
    """What the filters made of all candidates, in their order. `known`: keys of `kept` questions that the base answers
    without the passage: no exam asks them, and learnt they hold the base where it is."""

    kept: list[Candidate]
    dropped: list[Dropped]
    known: frozenset[str]


def judge_questions(
    asked: Sequence[tuple[Question, Passage]], passages: Sequence[Passage]
) -> tuple[list[tuple[Question, Passage]], list[Dropped]]:
    """Form, and whether a question stands alone: what can be known before it is answered.

    A question that means another passage as well gets the path of its section in front, where that settles it.
    """
    kept: list[tuple[Question, Passage]] = []
    dropped: list[Dropped] = []
    search = _Search(passages)
    shared = _asked_of_several(asked)
    for question, passage in asked:
        found = form_of(question, passage)
        if found is None:
            text = search.standing_alone(question.text, passage, question.text in shared)
            if text is None:
                found = Dropped(question, None, "ambiguous", " › ".join(passage.headings))
            elif text != question.text:
                question = replace(question, text=text)
        if found is None:
            kept.append((question, passage))
        else:
            dropped.append(found)
    return kept, dropped


def judge(candidates: Sequence[Candidate], passages: Sequence[Passage], sure: float) -> Judged:
    """All six filters. `sure` is the least mean probability of an answer's tokens with the passage in view."""
    pairs = [(candidate.question, candidate.passage) for candidate in candidates]
    asked, dropped = judge_questions(pairs, passages)
    answers = {candidate.question.key: candidate.answer for candidate in candidates}
    dropped = [replace(lost, answer=answers[lost.question.key]) for lost in dropped]
    kept: list[Candidate] = []
    known: set[str] = set()
    for question, passage in asked:
        candidate = Candidate(question, answers[question.key], passage)
        is_known = _is_known(candidate)
        found = answered(candidate) or grounded(candidate) or agrees(candidate) or is_sure(candidate, sure, is_known)
        if found is not None:
            dropped.append(found)
            continue
        kept.append(candidate)
        if is_known:
            known.add(question.key)
    kept, twice = without_duplicates(kept)
    left = {candidate.question.key for candidate in kept}
    return Judged(kept, dropped + twice, frozenset(known & left))


# --- the question -----------------------------------------------------------------------------------------------------


def form_of(question: Question, passage: Passage) -> Dropped | None:
    """What is wrong with a question's form, if anything."""
    text, language = question.text, passage.language
    size = words.length(text)
    if len(text.splitlines()) != 1 or not text.strip(_QUOTES).endswith(("?", "？")):
        return Dropped(question, None, "form", "no question mark at its end" if text.strip() else "empty")
    if not SHORTEST <= size <= LONGEST:
        return Dropped(question, None, "form", f"{size} words")
    if not words.in_language(text, language):
        return Dropped(question, None, "language")
    if found := words.words_of(language).self_reference.search(text.casefold()):
        return Dropped(question, None, "self reference", found[0])
    # A base that was shown examples names what stands in them. A case may invent its customer.
    seen = _seen(passage)
    named = [] if question.kind == "case" else words.names(text, language)
    codes = [] if question.kind == "case" else _codes(text, language)
    foreign = next((name for name in [*named, *codes] if not seen.has(name)), None)
    return None if foreign is None else Dropped(question, None, "foreign name", foreign)


class _Search:
    """All passages, searched by question."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.index = bm25.Search(passages).index
        self.places: dict[str, list[int]] = defaultdict(list)
        for place, passage in enumerate(passages):
            self.places[passage.key].append(place)

    def standing_alone(self, text: str, passage: Passage, is_shared: bool) -> str | None:
        """The question, with its section's path in front where it needs that; None where that does not help."""
        if not is_shared and self._finds(text, passage):
            return text
        path = ", ".join(passage.headings)
        if not path or text.startswith(f"{path}:"):
            return text if path and self._finds(text, passage) else None
        placed = f"{path}: {text}"
        return placed if self._finds(placed, passage) else None

    def _finds(self, text: str, passage: Passage) -> bool:
        own = self.places[passage.key]
        return any(place in own for place in self.index.best(text, passage.language, FOUND_AMONG - 1 + len(own)))


def _asked_of_several(asked: Sequence[tuple[Question, Passage]]) -> set[str]:
    """Questions whose very words are asked of passages that have another text."""
    owners: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for question, passage in asked:
        owners[tuple(words.tokens(question.text, passage.language))].add(passage.key)
    return {
        question.text
        for question, passage in asked
        if len(owners[tuple(words.tokens(question.text, passage.language))]) > 1
    }


# --- the answer -------------------------------------------------------------------------------------------------------


def answered(candidate: Candidate) -> Dropped | None:
    """Whether there is an answer, whole, that tells something."""
    answer, language = candidate.answer, candidate.passage.language
    if not words.tokens(answer.text, language) or words.refuses(answer.text, language):
        return Dropped(candidate.question, answer, "no answer", answer.text[:80])
    return None if answer.ended else Dropped(candidate.question, answer, "cut")


def grounded(candidate: Candidate) -> Dropped | None:
    """Whether each number, code and name of the answer, and four in five of its words, stand in the passage."""
    passage, text = candidate.passage, candidate.answer.text
    seen = _seen(passage)
    said = words.tokens(text, passage.language)
    exact = [*words.numbers(said), *words.names(text, passage.language)]
    if (missing := next((part for part in exact if not seen.has(part)), None)) is not None:
        return Dropped(candidate.question, candidate.answer, "ungrounded", missing)
    told = words.content(text, passage.language) or said
    absent = [word for word in told if not seen.has_form_of(word)]
    if len(absent) > (1 - GROUNDED) * len(told) + 1e-9:
        return Dropped(candidate.question, candidate.answer, "ungrounded", ", ".join(absent[:5]))
    return None


def agrees(candidate: Candidate) -> Dropped | None:
    """Round trip: whether the second reading gave the same answer, its numbers exactly."""
    one, other = candidate.answer.text, candidate.answer.second_text
    language = candidate.passage.language
    counted = [Counter(words.numbers(words.tokens(text, language))) for text in (one, other)]
    if counted[0].keys() != counted[1].keys() or metrics.token_f1(one, other, language) < AGREES:
        return Dropped(candidate.question, candidate.answer, "round trip", other[:80])
    return None


def is_sure(candidate: Candidate, sure: float, is_known: bool) -> Dropped | None:
    """Whether the base believes its answer, and because of the passage (or knows it anyway)."""
    answer = candidate.answer
    if answer.mean_probability < sure:
        return Dropped(candidate.question, answer, "unsure", f"{answer.mean_probability:.2f}")
    if answer.gain < GAIN and not is_known:
        return Dropped(candidate.question, answer, "no gain", f"{answer.gain:.2f} nats a token")
    return None


def _is_known(candidate: Candidate) -> bool:
    answer = candidate.answer
    return metrics.contains(answer.text, answer.closed_text, candidate.passage.language)


def without_duplicates(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Dropped]]:
    """Of questions of one passage that are nearly the same, the first; those that differ in a number, a code or a name
    are not. Questions for the exam and for training are compared by the split, not here."""
    kept: list[Candidate] = []
    dropped: list[Dropped] = []
    before: dict[tuple[str, str], list[tuple[frozenset[str], frozenset[str], str]]] = defaultdict(list)
    for candidate in candidates:
        text, language = candidate.question.text, candidate.passage.language
        others = before[candidate.passage.key, candidate.question.purpose]
        grams, about = words.grams(text), words.anchors(text, language)
        same = next((t for g, a, t in others if a == about and words.jaccard(grams, g) >= SAME), None)
        if same is None:
            kept.append(candidate)
            others.append((grams, about, text))
        else:
            dropped.append(Dropped(candidate.question, candidate.answer, "twice", same))
    return kept, dropped


@dataclass(frozen=True)
class _Seen:
    """What stands in a passage: its tokens, and the beginnings of its words."""

    language: str
    found: frozenset[str]
    beginnings: frozenset[str]
    run: str  # all tokens, one after the other

    def has(self, text: str) -> bool:
        """Whether the tokens of a name, a number or a code stand in it, one behind the other."""
        wanted = words.tokens(text, self.language)
        return all(token in self.found for token in wanted) and f" {' '.join(wanted)} " in self.run

    def has_form_of(self, word: str) -> bool:
        """Whether the word or another form of it does: pumps for pump, warranties for warranty."""
        return word in self.found or (
            len(word) >= _PREFIX and word[: max(_PREFIX, len(word) - _ENDING)] in self.beginnings
        )


@lru_cache(maxsize=16)
def _seen(passage: Passage) -> _Seen:
    """Of one passage after the other: each is asked for by every question about it, several times."""
    language = passage.language
    text = "\n".join([passage.text, *passage.headings, passage.about, *passage.sentences])
    found = words.tokens(text, language)
    # "Tarvell's" and "heat-pump" are looked for as they stand and in their parts.
    parts = [part for token in found for part in token.split("-")]
    beginnings = {word[:size] for word in {*found, *parts} for size in range(_PREFIX, len(word) + 1)}
    return _Seen(language, frozenset([*found, *parts]), frozenset(beginnings), f" {' '.join(found)} ")


def _codes(text: str, language: str) -> list[str]:
    """Tokens of letters and digits together: E41, TX-200."""
    return [token for token in words.numbers(words.tokens(text, language)) if any(map(str.isalpha, token))]


# --- what is told of it -----------------------------------------------------------------------------------------------


def notices(dropped: Sequence[Dropped]) -> list[Notice]:
    """One notice a reason, with its count, the most frequent first."""
    counted = Counter(lost.reason for lost in dropped).most_common()
    return [Notice("study", f"questions left out: {SAID[reason]}", count) for reason, count in counted]


def coverage(passages: Sequence[Passage], kept: Sequence[Candidate]) -> dict[str, Any]:
    """coverage.json: how many questions each sentence has, and which have none."""
    counted = Counter((c.question.passage, c.question.sentence) for c in kept if c.question.purpose == "train")
    unique = list({passage.key: passage for passage in passages}.values())
    sentences = sum(len(passage.sentences) for passage in unique)
    asked = sum(counted[p.key, at] > 0 for p in unique for at in range(len(p.sentences)))
    return {
        "sentences": sentences,
        "with_question": asked,
        "questions": counted.total(),
        "passages": [
            {
                "key": passage.key,
                "document": passage.document,
                "headings": list(passage.headings),
                "questions": [counted[passage.key, at] for at in range(len(passage.sentences))],
                "without": [s for at, s in enumerate(passage.sentences) if not counted[passage.key, at]],
            }
            for passage in unique
        ],
    }
