"""How much work a run with documents has before it, in passes of its model and in tokens: what hours follow from.

How long a base's questions and answers will be, and how many of them the filters keep, nobody knows before it was
asked. So there are two amounts: of a base that says little and keeps little, and of one that says and keeps much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from qlora.recipe.reading import Recipe
from qlora.study import defaults
from qlora.study.ask import EXAM_PER_SENTENCE, EXAM_SPARE
from qlora.study.exam import RETRIEVED
from qlora.study.exam_asking import AT_ONCE as EXAM_AT_ONCE
from qlora.study.exam_asking import NATS_TOKENS
from qlora.study.probe import PASSAGES, QUESTIONS
from qlora.study.rows import DISTRACTORS, Shares
from qlora.study.teacher import AT_ONCE

if TYPE_CHECKING:
    from qlora.data.documents.chunks import Passage

UNANSWERABLE, NEUTRAL = 20, 100  # questions that no document answers; prompts on other things (exam_questions.py)
# Tokens of a prompt beside the passage: the words around it (once for all questions), the sentence and the question.
AROUND, OWN = 40, 35
PASSES_A_STEP = 4  # of training, in the time of one forward pass: forward once, backward twice, the update
MOST_ROWS, FEWEST_STEPS = 16, 100  # of train.batch_size = "auto"
CHARS_A_TOKEN = 4  # of text, where no tokenizer is at hand: English by a byte-level BPE


class Manners(NamedTuple):
    """Tokens of the longest question and answer of a batch, answers on other things, rounds, shares of the questions
    asked for the exam and for training that are kept, and tokens of a row learnt without a passage."""

    question: int
    answer: int
    other: int
    rounds: float
    exam: float
    kept: float
    row: int


# The handbook of recipes/manuals.toml with its tiny base: 17 and 6 tokens, 1.1 rounds, 53 % of the questions kept, 37
# tokens a row. An instruct base of billions writes 20 to 40 tokens, in one to two rounds, and nine of ten stand.
LITTLE = Manners(question=17, answer=6, other=16, rounds=1.0, exam=0.5, kept=0.4, row=35)
MUCH = Manners(question=32, answer=40, other=64, rounds=1.5, exam=1.0, kept=0.9, row=70)


@dataclass(frozen=True)
class Work:
    """Forward `passes`; `tokens` that go through the layers, each of which looks back at others, `seen` in sum; and
    `logits` that are computed, of a token each."""

    passes: float = 0.0
    tokens: float = 0.0
    seen: float = 0.0
    logits: float = 0.0

    def __add__(self, other: Work) -> Work:
        pairs = zip(self.parts, other.parts, strict=True)
        return Work(*(one + another for one, another in pairs))

    def times(self, factor: float) -> Work:
        return Work(*(factor * part for part in self.parts))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        return self.passes, self.tokens, self.seen, self.logits


@dataclass(frozen=True)
class Amount:
    """The work of one way that a run may go: `study`, `exam` (before and after), and `training`."""

    study: Work
    exam: Work
    training: Work


@dataclass(frozen=True)
class Documents:
    """What is known of documents: `passages`, tokens of one of them on average, `sentences` in all of them, and of rows
    of the recipe's own their tokens."""

    passages: int
    tokens: float
    sentences: int
    own_tokens: int = 0

    @classmethod
    def of(cls, passages: Sequence[Passage], own_tokens: int = 0) -> Documents:
        """Tokens by their characters: a passage is as long as its text, whatever the tokenizer."""
        characters = sum(len(passage.text) for passage in passages)
        tokens = characters / CHARS_A_TOKEN / max(1, len(passages))
        return cls(len(passages), tokens, sum(len(passage.sentences) for passage in passages), own_tokens)


def amounts(recipe: Recipe, documents: Documents, decides_length: bool) -> tuple[Amount, Amount]:
    """The least and the most work of a run. `decides_length`: the study says how many epochs there are."""
    least, most = (_amount(recipe, documents, decides_length, manners) for manners in (LITTLE, MUCH))
    return least, most


def _amount(recipe: Recipe, documents: Documents, decides_length: bool, manners: Manners) -> Amount:
    exam = recipe.exam
    hidden = round(exam.left_out * documents.sentences) if exam.questions else 0
    for_exam = min(EXAM_SPARE * exam.questions, EXAM_PER_SENTENCE * documents.sentences) + EXAM_PER_SENTENCE * hidden
    trained = recipe.study.questions * documents.passages
    kept = manners.kept * trained
    shown, held = Shares(recipe.study.with_passage, recipe.study.hold).counts(round(kept))
    asked = (trained + for_exam) / max(1, documents.passages)  # of a passage
    study = _of_passage(asked, documents.tokens, manners).times(documents.passages * manners.rounds)
    probe = _of_passage(QUESTIONS / PASSAGES, documents.tokens, manners).times(2 * PASSAGES * recipe.study.probe)
    others = writing(held, 0, OWN, manners.other, AT_ONCE)
    questions = min(exam.questions, documents.sentences)
    examined = _exam(questions, EXAM_PER_SENTENCE * hidden * manners.exam, documents.tokens, manners)
    with_passages = (1 + DISTRACTORS) * documents.tokens + AROUND + OWN
    if with_passages > recipe.data.max_length:  # most of these rows are too long, and left out
        shown = 0
    rows = kept * manners.row + held * (OWN + manners.other) + shown * with_passages
    sentences = documents.sentences - hidden
    epochs = defaults.epochs(round(kept), sentences) if decides_length else recipe.train.epochs or 0.0
    training = _training(recipe, (rows + documents.own_tokens, epochs), manners)
    return Amount(study + probe + others, examined if exam.questions else Work(), training)


def _of_passage(asked: float, tokens: float, manners: Manners) -> Work:
    """Questions about one passage: asked, answered with it and without it, scored, and read a second time."""
    groups = (
        writing(asked, tokens + AROUND, OWN, manners.question, AT_ONCE),
        writing(asked, tokens + AROUND, OWN, manners.answer, AT_ONCE),
        writing(asked, 0, OWN, manners.answer, AT_ONCE),
        writing(asked, 0, OWN + manners.answer, 1, AT_ONCE),
        writing(asked, AROUND, OWN, manners.answer, AT_ONCE),
    )
    return sum(groups, Work())


def _exam(questions: float, left_out: float, tokens: float, manners: Manners) -> Work:
    closed = writing(questions + left_out + UNANSWERABLE, 0, OWN, manners.answer, EXAM_AT_ONCE)
    retrieved = writing(questions, 0, RETRIEVED * tokens + AROUND, manners.answer, EXAM_AT_ONCE)
    own = writing(questions, 0, tokens + AROUND, manners.answer, EXAM_AT_ONCE)
    compared = writing(NEUTRAL, 0, OWN, NATS_TOKENS, EXAM_AT_ONCE) + writing(2 * NEUTRAL, 0, OWN + NATS_TOKENS, 1, 1)
    return (closed + retrieved).times(2) + own + compared


def writing(rows: float, shared: float, own: float, longest: int, at_once: int) -> Work:
    """`rows` prompts in batches of `at_once`: `shared` tokens of each batch are read once, `own` of each row, and every
    row is written until the longest one ends."""
    if rows <= 0:
        return Work()
    batches = ceil(rows / at_once)
    passes = batches * (longest + bool(shared))
    read = batches * shared + rows * own
    seen = rows * (own * (shared + own / 2) + longest * (shared + own + longest / 2))
    return Work(passes, read + rows * (longest - 1), seen, rows * longest)


def _training(recipe: Recipe, lasts: tuple[float, float], manners: Manners) -> Work:
    """`lasts`: tokens of an epoch, and epochs."""
    length, (tokens_of_epoch, epochs) = recipe.data.max_length, lasts
    packs, train = max(1.0, tokens_of_epoch / length), recipe.train
    if train.max_steps is not None:
        rows = min(MOST_ROWS, max(1, packs // FEWEST_STEPS)) if train.batch_size == "auto" else train.batch_size
        epochs = train.max_steps * rows / packs
    step = Work(1, length, length * manners.row / 2, length / 4)  # of a pack each row sees itself alone
    return step.times(packs * epochs * PASSES_A_STEP)
