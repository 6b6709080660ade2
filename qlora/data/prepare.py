"""From the recipe's [data] to rows of tokens: read, recognized, tokenized once, and split.

Tokens are cached in a folder whose name is the hash of all that made them: the files' contents, the tokenizer, the
template, the settings and the version of this code. The folder is published by one rename and checked against its
manifest before it is used again; with it lies what was rejected, so that a cached run reports the same as the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from qlora import disk
from qlora.data import dropped
from qlora.data.chat import ChatTokenizer
from qlora.data.conversations import bad_row, conversations, file_of, leave_out
from qlora.data.judged_rows import in_length, judged
from qlora.data.limits import text_limits
from qlora.data.made_rows import MadeBatch, RawBatch, RowMaker
from qlora.data.raw_batches import raw_batches
from qlora.data.render import give_up
from qlora.data.row_cache import ROWS_FILE, CachedRows, RowCache, RowReport
from qlora.data.row_json import RowError, RowTooLong
from qlora.data.row_workers import RowWorkers
from qlora.data.source_files import FoundFiles
from qlora.data.sources import source_files
from qlora.data.token_cache import MadeRow, PreparedSplit, RowWriter
from qlora.data.unread import count_remarks, first_of, notices
from qlora.errors import DataError
from qlora.events import Notice, Progress, Sink
from qlora.shown import one_line

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection, SourceSection

__all__ = ["NO_ROWS", "PreparedData", "PreparedSplit", "check_files", "prepare"]

# Raise it whenever rows come out otherwise than before: cached tokens of older code are then made anew.
CODE_VERSION, OLDER_CODE_VERSION = 3, 1
_MADE_AS = {"documents": "documents, special tokens broken up"}  # of formats whose tokens became others
CHECKED_ROWS = 20  # good rows of each source that `check_files` looks at
MAX_LOOKED_AT = 10_000  # and bad ones, before it leaves the rest to the tokenization


@dataclass(frozen=True)
class PreparedData:
    """`fingerprint`: sha256 over every token, weight and setting; a resumed run refuses another.

    `content_fingerprint`: sha256 over tokens, weights, sources, their order and the split alone: it stays the same with
    other versions of the libraries, other settings or another place of the files as long as these come out the same.
    `older_fingerprint`: what older code would call these very tokens; runs of then kept no `content_fingerprint`.
    `reports`: what became of the rows of [[data.train]], and of those of [[data.eval]] where there are any.
    """

    train: PreparedSplit
    eval: PreparedSplit
    fingerprint: str
    content_fingerprint: str
    older_fingerprint: str
    reports: tuple[RowReport, ...] = ()


# Of a recipe without sources of rows, whose documents are studied.
_NONE = PreparedSplit([], [], [], [], [])
NO_ROWS = PreparedData(_NONE, _NONE, "", "", "", ())


def check_files(data: DataSection) -> None:
    """Raise DataError for missing files, sources without rows, and first rows that are broken. Needs no tokenizer."""
    for source in (*data.train, *data.eval):
        found = too_long = 0
        looked_at: list[RowError | None] = []
        worst: tuple[str, RowError] | None = None  # the first bad row that is one too many
        for number, (row, conversation) in enumerate(conversations(source, {}), 1):
            error = conversation if isinstance(conversation, RowError) else None
            if isinstance(error, RowTooLong):
                leave_out(data, error, row.where)
                too_long += 1
            else:
                looked_at.append(error)
                if error and not worst and sum(map(bool, looked_at)) > data.max_bad_rows:
                    worst = row.where, error
            found += not isinstance(row.row, RowError)
            if found == CHECKED_ROWS or number == MAX_LOOKED_AT or (worst and number >= CHECKED_ROWS):
                break
        if worst:
            raise bad_row(*worst, data.max_bad_rows, looked_at)
        if not found:
            what = f"no rows but {too_long} that are too long to be read" if too_long else "no rows"
            raise DataError(f"{source.path}: {what}", "put at least one row into it")


def prepare(
    data: DataSection, tokenizer_folder_fingerprint: str, chat: ChatTokenizer, seed: int, cache_dir: Path, sink: Sink
) -> PreparedData:
    """Rows of tokens to train and to evaluate on. Raises DataError; says what it did through events."""
    vocab = chat.tokenizer.get_vocab()
    cache = RowCache(cache_dir, max(vocab.values(), default=0), sink)
    maker = _Maker(data, tokenizer_folder_fingerprint, chat, max(map(len, vocab), default=1), cache, sink)
    made, keys = maker.rows_of(data.train)
    stored, reports = made.stored, [made.report]
    if data.eval:
        eval_made, eval_keys = maker.rows_of(data.eval)
        eval_stored, reports = eval_made.stored, [*reports, eval_made.report]
        train, evaluation = stored.split(), eval_stored.split()
        content = stored.content_sha256("") + eval_stored.content_sha256("")
    else:
        held_out, kept = stored.hold_out(data.eval_fraction, seed)
        train, evaluation, eval_keys = stored.split(kept), stored.split(held_out), [f"{data.eval_fraction} {seed}"] * 2
        content = stored.content_sha256(json.dumps(held_out))
        if held_out:
            message = f"{len(held_out)} of {len(stored.digests)} rows held out for evaluation"
            sink.emit(Notice("split", message, len(held_out)))
    train = judged(train, [source.format for source in data.train], data.packing)
    evaluation = judged(evaluation, [source.format for source in data.eval or data.train], data.packing)
    now, older = map(disk.sha256_text, keys, eval_keys)
    return PreparedData(train, evaluation, now, disk.sha256_text(content), older, tuple(reports))


@dataclass(frozen=True)
class _Maker:
    """Tokenizes sources, or finds them tokenized."""

    data: DataSection
    tokenizer_fingerprint: str
    chat: ChatTokenizer
    longest_token: int  # in characters
    cache: RowCache
    sink: Sink

    def rows_of(self, sources: Sequence[SourceSection]) -> tuple[CachedRows, list[str]]:
        """Rows of all sources, and the sha256 of what they are and what made them: this code, and older code."""
        found = [source_files(source) for source in sources]
        for source, files in zip(sources, found, strict=True):
            for what, count, names in files.left_out:
                message = f"{_name(source)}: {count} {what} left out: {', '.join(names)}"
                self.sink.emit(Notice("files", message + (", …" if count > len(names) else ""), count))
        key = self._key(sources, found, CODE_VERSION)
        cached = self.cache.rows(key, lambda place: _Tokenization(self, sources, found, place).run())
        self._emit(cached.report, cached.folder)
        made_by = [key, self._key(sources, found, OLDER_CODE_VERSION)]
        return cached, [disk.sha256_text(code, cached.report.content_sha256) for code in made_by]

    def _key(self, sources: Sequence[SourceSection], found: Sequence[FoundFiles], code: int) -> str:
        files = [[index, file.name, file.sha256()] for index, of_one in enumerate(found) for file in of_one.files]
        made_by = {
            "code": code,
            "libraries": [version("transformers"), version("tokenizers"), version("jinja2")],
            "tokenizer": self.tokenizer_fingerprint,
            "template": self.chat.templates,
            "files": files,
            "sources": [[_MADE_AS.get(one.format, one.format), sorted(one.columns.items())] for one in sources],
            "settings": [self.data.max_length, self.data.truncation, self.data.loss_on, self.data.max_bad_rows],
        }
        return disk.sha256_text(json.dumps(made_by, sort_keys=True))

    def _emit(self, report: RowReport, cached_in: Path | None) -> None:
        if cached_in:
            self.sink.emit(Notice("cache", f"rows were tokenized before: read from {cached_in}", report.rows))
        up_to = f"rows of up to {self.data.max_length} tokens"
        formats = (Notice("format", f"{file}: {name}, told by its columns") for file, name in report.formats.items())
        pieces = (
            Notice("text", f"{file}: cut at its paragraphs into {count} {up_to}", count)
            for file, count in report.pieces.items()
        )
        remarks = notices(report.remarks, self.data.loss_on)
        for said in (formats, remarks, pieces, report.rejected.values()):
            for event in first_of(said):
                self.sink.emit(event)
        if report.cut:
            limit = self.data.max_length
            self.sink.emit(Notice("truncation", f"{report.cut} rows cut to their first {limit} tokens", report.cut))
        for notice in dropped.notices(report.dropped):
            self.sink.emit(notice)
        counts = f"{report.rows} rows, {report.tokens} tokens, {report.trained} of them trained"
        self.sink.emit(Notice("rows", counts, report.rows))


class _Tokenization:
    """One reading of the sources into a folder: rows of tokens, and the report on them."""

    def __init__(
        self, maker: _Maker, sources: Sequence[SourceSection], found: Sequence[FoundFiles], folder: Path
    ) -> None:
        self.data, self.chat, self.sink = maker.data, maker.chat, maker.sink
        self.limits = text_limits(self.data.max_length, self.data.truncation, maker.longest_token)
        self.sources, self.found = sources, found
        self.folder = folder
        self.bounds = list(self.chat.bounds)
        self.report = RowReport()
        self.bad = 0

    def run(self) -> None:
        total_bytes = sum(file.size_bytes for found in self.found for file in found.files)
        maker = RowMaker(self.chat, self.limits, self.data.max_length)
        with RowWriter(self.folder / ROWS_FILE) as writer, RowWorkers(maker, total_bytes) as workers:
            for batch, made in workers.made(self._batches()):
                if kept := [(*row, batch.source) for row in self._kept(self.sources[batch.source], made)]:
                    writer.write(kept)
                self.sink.emit(Progress("tokenize", batch.read_bytes, batch.total_bytes, "B"))
                if batch.last:
                    self.report.end_source(self.data.max_length)
            self.report.content_sha256 = writer.content_sha256()
        if not self.report.rows:
            raise self._nothing_left()
        self.report.write(self.folder)

    def _batches(self) -> Iterator[RawBatch]:
        for number, (source, found) in enumerate(zip(self.sources, self.found, strict=True)):
            yield from raw_batches(number, source, found.files, self.report.formats)

    def _kept(self, source: SourceSection, made: MadeBatch) -> Iterator[tuple[MadeRow, str]]:
        """The rows of a batch that are used, with their places; the others are counted, or end it all."""
        self.bounds += made.bounds
        give_up(self.bounds)
        if made.error:
            raise made.error
        if made.tools:
            self.chat.tell_hidden_tools()
        for where, remarks in made.remarks:
            count_remarks(self.report.remarks, file_of(where), remarks)
        for kind, count in made.dropped.items():
            self.report.dropped[kind] = self.report.dropped.get(kind, 0) + count
        for where, pieces in made.pieces:
            self.report.cut_text(where, pieces)
        are_pairs, cuts = source.format == "preference", self.data.truncation == "cut"
        for where, found in in_length(made.rows, self.data.max_length, cuts) if are_pairs else made.rows:
            row: MadeRow | RowError | None = found
            if isinstance(row, MadeRow) and len(row.ids) > self.data.max_length:
                row = self._shortened(source, row, where)
            if isinstance(row, RowTooLong):
                leave_out(self.data, row, where)
                self.report.leave_out(_name(source), row, where)
            elif isinstance(row, RowError):
                self.bad += 1
                if self.bad > self.data.max_bad_rows:
                    beside = [other for at, other in made.rows if file_of(at) == file_of(where)]
                    raise bad_row(where, row, self.data.max_bad_rows, beside)
                self.report.reject(_name(source), row.reason, where)
            elif row is not None:
                self.report.rows += 1
                self.report.tokens += len(row.ids)
                self.report.trained += len(row.weights) - row.weights.count(0.0)
                yield row, where

    def _shortened(self, source: SourceSection, row: MadeRow, where: str) -> MadeRow | None:
        """What becomes of a row over max_length: None when it is left out."""
        limit, length = self.data.max_length, len(row.ids)
        if self.data.truncation == "error":
            raise DataError(
                f"{where}: the row has {length} tokens, over data.max_length = {limit}",
                'raise data.max_length, shorten the row, or set data.truncation to "drop" or "cut"',
            )
        self.report.long_lengths.append(length)
        reason = f"over max_length = {limit} tokens"
        if self.data.truncation == "cut":
            cut = MadeRow(row.ids[:limit], row.weights[:limit], row.prompt)
            if any(cut.weights):
                self.report.cut += 1
                return cut
            reason = f"nothing trained is left of it within max_length = {limit} tokens"
        self.report.drop(_name(source), reason, where)
        return None

    def _nothing_left(self) -> DataError:
        paths = ", ".join(source.path for source in self.sources)
        if self.report.unread and not self.report.long_lengths:
            limit = self.data.max_length
            what = f"{paths}: no row is left: {self.report.unread} are far over data.max_length = {limit} tokens"
            return DataError(what, "split the rows")
        if not self.report.long_lengths:
            most = max(self.report.rejected.values(), key=lambda entry: entry.count, default=None)
            why = f", {most.count} of them because {most.reason}" if most else ""
            return DataError(f"{paths}: no row is left to use ({self.bad} are bad{why})", "mend that, or add rows")
        long, limit = self.report.long_lengths, self.data.max_length
        return DataError(
            f"{paths}: no row is left: {len(long)} are over data.max_length = {limit} tokens "
            f"(the longest has {max(long)}, half of them {int(median(long))} or more)",
            'raise data.max_length, split the rows, or set data.truncation = "cut"',
        )


def _name(source: SourceSection) -> str:
    """A source's name in reports, which outlive the place where the project's folder lies."""
    return one_line(Path(source.path).name)
