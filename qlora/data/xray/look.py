"""All that is seen of prepared rows, put together: what `qlora-data` draws, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy

from qlora.data.judged_splits import apart, unit_size
from qlora.data.prepare import PreparedData
from qlora.data.row_cache import RowReport, SourceCounts
from qlora.data.token_cache import PreparedSplit
from qlora.data.unread import CONTROL, TAUGHT
from qlora.data.xray import alike, leaks, tokens
from qlora.data.xray.drawing import DrawnPack, draw
from qlora.data.xray.lengths import Bar, Packing, fill_of, histogram
from qlora.data.xray.serving import Serving, compare

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer
    from qlora.recipe.sections import DataSection, SourceSection

EXAMPLES = 3


@dataclass(frozen=True)
class Reason:
    """Why rows of a source are left out; `examples` are `file:line` of the first."""

    reason: str
    too_long: bool  # else it is bad
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SourceView:
    """One [[data.train]] or [[data.eval]]. `side` says which; the counts are those of `SourceCounts`."""

    side: str
    path: str
    rows: int
    tokens: int
    trained: int
    cut: int
    dropped: int
    rejected: int
    reasons: tuple[Reason, ...]
    longest: int  # in tokens, of the rows that were over max_length


@dataclass(frozen=True)
class Found:
    """How many rows are of a kind, and `file:line` of some: alone, or beside the row that they are compared with."""

    count: int
    examples: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class SplitView:
    """The rows of a side as they are used, after the split.

    not_ended    rows whose last trained token is none that ends an answer
    bos          rows that begin with no, one, and more tokens BOS; None: the tokenizer has none
    copies       rows that are the same to the token as an earlier one
    alike        rows that are nearly the same as an earlier one, among the first `compared`; `all_compared`: no more
    conflicting  rows whose question stands in other rows with another answer
    """

    rows: int
    tokens: int
    trained: int
    longest: int
    longest_at: str
    ended: int
    not_ended: Found
    bos: tuple[int, int, int] | None
    copies: Found
    alike: Found
    compared: int
    all_compared: bool
    conflicting: Found


@dataclass(frozen=True)
class LeakView:
    """Evaluation rows of which training has every token, the question, the answer, or the answer within a text."""

    rows: Found
    questions: Found
    answers: Found
    inside: Found


@dataclass(frozen=True)
class Seen:
    """What there is to see of a recipe's rows."""

    base: str
    max_length: int
    truncation: str
    loss_on: str
    sources: tuple[SourceView, ...]
    train: SplitView
    eval: SplitView | None
    lengths: tuple[Bar, ...]
    packing: Packing
    serving: Serving
    leaks: LeakView | None
    drawn: tuple[DrawnPack, ...]
    taught: Found = Found(0)  # answers that are trained and hold special tokens; each example: file, and which
    asked: Found = Found(0)  # special tokens in what is asked, the same

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def look(
    base: str,
    data: DataSection,
    chat: ChatTokenizer,
    prepared: PreparedData,
    packs: Sequence[tuple[int, ...]],
    rows: int,
) -> Seen:
    """Look at the rows of a recipe's [data]. `packs`: of the first epoch; `rows`: so many of them are drawn."""
    ids, packs = tokens.Ids.of(chat), apart(prepared.train, packs, data.max_length)
    train_facts, answers = tokens.look(prepared.train, ids)
    train = _split(prepared.train, train_facts, ids)
    evaluation, leaked = None, None
    if len(prepared.eval.lengths):
        eval_facts, _ = tokens.look(prepared.eval, ids)
        evaluation = _split(prepared.eval, eval_facts, ids)
        found = leaks.find(prepared.train, prepared.eval, (train_facts, eval_facts), answers)
        kinds = (found.rows, found.questions, found.answers, found.inside)
        leaked = LeakView(*(_found(prepared.eval, numbers) for numbers in kinds))
    return Seen(
        base=base,
        max_length=data.max_length,
        truncation=data.truncation,
        loss_on=data.loss_on,
        sources=_sources(data, prepared.reports),
        train=train,
        eval=evaluation,
        lengths=histogram(prepared.train.lengths, data.max_length, prepared.reports[:1]),
        packing=fill_of(data.packing, packs, train.tokens, data.max_length),
        serving=compare(prepared.train, train_facts, chat),
        leaks=leaked,
        drawn=draw(prepared.train, packs, rows, chat.tokenizer),
        taught=_remarked(prepared.reports[:1], TAUGHT),
        asked=_remarked(prepared.reports[:1], CONTROL),
    )


def _sources(data: DataSection, reports: Sequence[RowReport]) -> tuple[SourceView, ...]:
    sides: tuple[tuple[str, Sequence[SourceSection]], ...] = (("train", data.train), ("eval", data.eval))
    return tuple(
        _source(side, source.path, counts, report)
        for (side, sources), report in zip(sides, reports, strict=False)
        for source, counts in zip(sources, report.by_source, strict=True)
    )


def _source(side: str, path: str, counts: SourceCounts, report: RowReport) -> SourceView:
    """Examples are known by the name of a source and not by its path: they are of all sources of that name."""
    name = path.rstrip("/").rpartition("/")[2]
    reasons = tuple(
        Reason(
            reason,
            reason in counts.sizes,
            count,
            tuple(
                where
                for (of, why), entry in report.rejected.items()
                for where in entry.examples
                if why == reason and of == name
            ),
        )
        for reason, count in sorted(counts.reasons.items(), key=lambda item: -item[1])
    )
    values = (counts.rows, counts.tokens, counts.trained, counts.cut, counts.dropped, counts.rejected)
    return SourceView(side, path, *values, reasons, counts.longest)


def _split(split: PreparedSplit, facts: tokens.RowFacts, ids: tokens.Ids) -> SplitView:
    longest = max(range(len(split.lengths)), key=split.lengths.__getitem__)
    again, original = tokens.copies(facts.rows)
    near = alike.find(split, again)
    not_ended = numpy.flatnonzero(~facts.ended)
    bos = [int((facts.bos == 0).sum()), int((facts.bos == 1).sum()), int((facts.bos > 1).sum())]
    return SplitView(
        rows=len(split.lengths),
        tokens=sum(split.lengths),
        trained=sum(split.trained),
        longest=split.lengths[longest],
        longest_at=split.wheres[longest],
        ended=len(split.lengths) - len(not_ended),
        not_ended=_found(split, not_ended.tolist()),
        bos=None if ids.bos is None else (bos[0], bos[1], bos[2]),
        copies=_pairs(split, list(zip(again.tolist(), original.tolist(), strict=True))),
        alike=_pairs(split, [pair for pair in near.pairs if not _of_one(split, *pair)]),
        compared=near.compared,
        all_compared=near.whole,
        conflicting=_found(split, _conflicting(split, facts)),
    )


def _of_one(split: PreparedSplit, row: int, other: int) -> bool:
    """Whether two rows are the answers of one pair."""
    return unit_size(split) > 1 and row // 2 == other // 2


def _conflicting(split: PreparedSplit, facts: tokens.RowFacts) -> list[int]:
    """Rows whose question other rows answer otherwise."""
    if split.preference is not None:  # what such rows are for
        return []
    distinct = numpy.unique(numpy.stack([facts.questions, facts.answers], 1), axis=0)
    questions, answers = numpy.unique(distinct[:, 0], return_counts=True)
    disputed = questions[(answers > 1) & (questions != 0)]
    return [int(row) for row in numpy.flatnonzero(numpy.isin(facts.questions, disputed))]


def _remarked(reports: Sequence[RowReport], kind: str) -> Found:
    """What was remarked of training rows; a row with two of them counts twice."""
    said = [
        (rows, file, name)
        for report in reports
        for file, kinds in report.remarks.items()
        for name, rows in kinds.get(kind, {}).items()
    ]
    most = sorted(said, key=lambda one: (-one[0], one))[:EXAMPLES]
    return Found(sum(rows for rows, _, _ in said), tuple((f"{file}: {name}",) for _, file, name in most))


def _found(split: PreparedSplit, rows: Sequence[int]) -> Found:
    return Found(len(rows), tuple((split.wheres[row],) for row in rows[:EXAMPLES]))


def _pairs(split: PreparedSplit, pairs: Sequence[tuple[int, int]]) -> Found:
    return Found(len(pairs), tuple((split.wheres[row], split.wheres[other]) for row, other in pairs[:EXAMPLES]))
