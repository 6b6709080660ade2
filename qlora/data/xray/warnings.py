"""What of a look at rows will harm a run, the worst first, each with what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora.data.xray.look import Found, LeakView, Seen, SplitView

# Shares from which on a thing is worth a word: a judgement, not a law.
LOST_SHARE = 0.1  # of a side's rows, left out: more is no accident
COPIED_SHARE = 0.01
EMPTY_SHARE = 0.2  # of the places in packs
TRAINED_SHARE = 0.02
FEW_ROWS = 50

WRONG, WASTE, NOTE = "wrong", "harm", "note"  # spoils the run; makes it worse; good to know
_LONGER = "raise data.max_length, or split the rows"
_ORDER = (WRONG, WASTE, NOTE)


@dataclass(frozen=True)
class Warning:
    """`level`: see above. `fix`: what to do. `examples`: `file:line`, or what stands beside it."""

    level: str
    what: str
    fix: str
    count: int
    examples: tuple[tuple[str, ...], ...] = ()


def warnings_of(seen: Seen) -> list[Warning]:
    """In the order of their harm; of one level, those that concern a larger part of the rows first."""
    found = [*_of_prompts(seen), *_of_leaks(seen), *_of_sources(seen), *_of_copies(seen.train), *_of_shape(seen)]
    found += _of_tokens(seen)
    return sorted(found, key=lambda one: (_ORDER.index(one.level), -one.count))


def _of_prompts(seen: Seen) -> Iterator[Warning]:
    if seen.serving.differ:
        differ = seen.serving.differ
        what = f"of {seen.serving.compared:,} rows compared, {_rows(len(differ), 'is', 'are')} trained after another "
        fix = "name a template that renders history and question alike: model.chat_template"
        yield Warning(WRONG, f"{what}prompt than the one that is served", fix, len(differ), _single(differ))
    for name, side in _sides(seen):
        if side.bos is not None and side.bos[2]:
            fix = "take the BOS token out of the rows or out of the chat template"
            yield Warning(
                WRONG, f"{_rows(side.bos[2], 'begins', 'begin')} with BOS more than once{name}", fix, side.bos[2]
            )
        cut = sum(one.cut for one in seen.sources if one.side == ("eval" if name else "train"))
        unended = side.not_ended.count - min(cut, side.not_ended.count)
        if unended:
            what = (
                f"the last trained token of {_rows(unended)} is none that ends an answer{name}: nothing teaches to stop"
            )
            fix = "let the rows end with an assistant's turn, or name a template that ends it: model.chat_template"
            yield Warning(WRONG, what, fix, unended, side.not_ended.examples)


def _of_tokens(seen: Seen) -> Iterator[Warning]:
    """Special tokens in the rows' own text."""
    if seen.taught.count:
        what = f"{_rows(seen.taught.count, 'trains', 'train')} answers with special tokens of the base in their text"
        fix = "take them out: the model learns to write them as tokens, and a server may hide or act on these"
        yield Warning(WASTE, what, fix, seen.taught.count, seen.taught.examples)
    if seen.asked.count:
        what = f"{_rows(seen.asked.count, 'has', 'have')} special tokens of the base in what is asked: read as those"
        fix = "put a blank behind their first sign where text is meant; a server reads them as tokens too"
        yield Warning(NOTE, what, fix, seen.asked.count, seen.asked.examples)


def _of_leaks(seen: Seen) -> Iterator[Warning]:
    leaks = seen.leaks
    if leaks is None or seen.eval is None:
        return
    of = f"of {seen.eval.rows:,} evaluation rows"
    said = (
        (WRONG, leaks.rows, "stand in training rows to the token: the evaluation measures what was learnt by heart"),
        (WASTE, leaks.questions, "ask a question of training rows: the evaluation measures what was learnt by heart"),
        (
            NOTE,
            _only_answers(leaks),
            "have an answer that is one of training rows: they test other words, no new facts",
        ),
        (NOTE, leaks.inside, "have an answer that stands in the text of training rows"),
    )
    for level, found, words in said:
        if found.count:
            fix = (
                "take them out of one of the two"
                if level != NOTE
                else "keep other rows for [[data.eval]] if that is not meant"
            )
            yield Warning(level, f"{found.count:,} {of} {words}", fix, found.count, found.examples)


def _only_answers(leaks: LeakView) -> Found:
    """The answers of rows that are not there to the token are the news; a copy has its answer anyway."""
    count = leaks.answers.count - leaks.rows.count
    return Found(max(0, count), leaks.answers.examples if count > 0 else ())


def _of_sources(seen: Seen) -> Iterator[Warning]:
    limit = f"{seen.max_length:,} tokens"
    said = (
        ("rejected", "left out: they are bad", "repair the rows that are named"),
        ("dropped", f"left out: over data.max_length = {limit}", _LONGER + ', or set data.truncation = "cut"'),
        ("cut", f"cut to their first {limit}: their ends are not learnt", _LONGER),
    )
    for side, name in (("train", ""), ("eval", " for evaluation")):
        sources = [one for one in seen.sources if one.side == side]
        used = sum(one.rows for one in sources)
        for kind, words, fix in said:
            count = sum(getattr(one, kind) for one in sources)
            reasons = [reason for one in sources for reason in one.reasons if reason.too_long == (kind == "dropped")]
            examples = [where for reason in reasons for where in reason.examples] if kind != "cut" else []
            if count:
                level = WRONG if count >= LOST_SHARE * (used + count) else WASTE
                what = f"{_rows(count, 'is', 'are')} {words}{name}"
                yield Warning(level, what, fix, count, _single(examples))


def _of_copies(train: SplitView) -> Iterator[Warning]:
    if train.conflicting.count:
        what = f"{_rows(train.conflicting.count, 'answers', 'answer')} a question that other rows answer otherwise"
        fix = "keep the right answer, unless several are right"
        yield Warning(WASTE, what, fix, train.conflicting.count, train.conflicting.examples)
    for found, words in (
        (train.copies, "the same to the token as an earlier row"),
        (train.alike, "nearly the same as an earlier row"),
    ):
        if found.count:
            level = WASTE if found.count >= COPIED_SHARE * train.rows else NOTE
            count = f"{_rows(found.count, 'is', 'are')} {words}"
            yield Warning(
                level, count, "take them out: a row that stands twice counts twice", found.count, found.examples
            )


def _of_shape(seen: Seen) -> Iterator[Warning]:
    train, packing = seen.train, seen.packing
    if packing.on and packing.share < 1 - EMPTY_SHARE and packing.packs > 1:
        what = f"packs are {packing.share:.0%} full: the rest is computed for nothing"
        yield Warning(
            NOTE, what, "choose a data.max_length that rows fill better: their lengths are drawn", packing.packs
        )
    if train.trained < TRAINED_SHARE * train.tokens:
        what = f"{train.trained / train.tokens:.1%} of the tokens are trained: the rest is read in every step"
        yield Warning(NOTE, what, "shorten what stands before the answers", train.rows)
    if train.rows < FEW_ROWS:
        what = f"{_rows(train.rows, 'is', 'are')} few to learn from"
        yield Warning(NOTE, what, "add rows; some hundreds are a beginning", train.rows)
    if seen.eval is None:
        fix = "set data.eval_fraction, or add [[data.eval]]"
        yield Warning(NOTE, "no row is kept for evaluation: nobody will know whether it learns or repeats", fix, 0)


def _sides(seen: Seen) -> Iterator[tuple[str, SplitView]]:
    yield "", seen.train
    if seen.eval is not None:
        yield " of evaluation", seen.eval


def _rows(count: int, one: str = "", several: str = "") -> str:
    words = f"1 row {one}" if count == 1 else f"{count:,} rows {several}"
    return words.rstrip()


def _single(wheres: tuple[str, ...] | list[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((where,) for where in wheres[:3])
