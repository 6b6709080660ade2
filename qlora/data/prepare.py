"""From the recipe's [data] to rows of tokens: read, recognized, tokenized once, and split.

Tokens are cached in a folder whose name is the hash of all that made them: the files' contents, the tokenizer, the
template, the settings and the version of this code. The folder is published by one rename and checked against its
manifest before it is used again; with it lies what was rejected, so that a cached run reports the same as the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qlora import disk
from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation, RowError, detect_format, to_conversation
from qlora.data.sources import SourceRow, file_name, read_rows, source_files
from qlora.data.token_cache import PreparedSplit, RowWriter, StoredRows, open_rows
from qlora.errors import DataError
from qlora.events import Notice, Progress, Rejected, Sink

if TYPE_CHECKING:
    from qlora.recipe.sections import DataSection, SourceSection

__all__ = ["PreparedData", "PreparedSplit", "check_files", "prepare"]

# Raise it whenever rows come out otherwise than before: cached tokens of older code are then made anew.
CODE_VERSION = 1
ROWS_FILE, REPORT_FILE = "rows.arrow", "report.json"
BATCH_ROWS = 256
CHECKED_ROWS = 20  # rows of each source that `check_files` looks at
EXAMPLES = 5  # `file:line` given per reason


@dataclass(frozen=True)
class PreparedData:
    """`fingerprint`: sha256 over every token, weight and setting; a resumed run refuses another.

    `content_fingerprint`: sha256 over tokens, weights, sources, their order and the split alone: it stays the same with
    other versions of the libraries, other settings or another place of the files as long as these come out the same.
    """

    train: PreparedSplit
    eval: PreparedSplit
    fingerprint: str
    content_fingerprint: str


@dataclass
class _Report:
    """What there is to say about a side's rows; stored beside them."""

    content_sha256: str = ""
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    lost_reasoning: int = 0
    formats: dict[str, str] = field(default_factory=dict)  # of each file whose format is known by its columns
    rejected: dict[tuple[str, str], Rejected] = field(default_factory=dict)  # by source and reason
    long_lengths: list[int] = field(default_factory=list)  # tokens of the rows over max_length

    def reject(self, source: str, reason: str, where: str) -> None:
        before = self.rejected.get((source, reason), Rejected(source, reason, 0))
        examples = (*before.examples, where)[:EXAMPLES]
        self.rejected[source, reason] = Rejected(source, reason, before.count + 1, examples)

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"rejected": [asdict(entry) for entry in self.rejected.values()]}
        (folder / REPORT_FILE).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> _Report:
        values: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        entries = [Rejected(**entry | {"examples": tuple(entry["examples"])}) for entry in values["rejected"]]
        return cls(**values | {"rejected": {(entry.source, entry.reason): entry for entry in entries}})


def check_files(data: DataSection) -> None:
    """Raise DataError for missing files, sources without rows, and first rows that are broken. Needs no tokenizer."""
    for source in (*data.train, *data.eval):
        bad, found = 0, 0
        for row, conversation in _conversations(source, {}):
            if isinstance(conversation, RowError):
                bad += 1
                if bad > data.max_bad_rows:
                    raise _bad_row(row.where, conversation, data.max_bad_rows)
            found += not isinstance(row.row, RowError)
            if found == CHECKED_ROWS:
                break
        if not found:
            raise DataError(f"{source.path}: no rows", "put at least one row into it")


def prepare(
    data: DataSection, tokenizer_folder_fingerprint: str, chat: ChatTokenizer, seed: int, cache_dir: Path, sink: Sink
) -> PreparedData:
    """Rows of tokens to train and to evaluate on. Raises DataError; says what it did through events."""
    maker = _Maker(data, tokenizer_folder_fingerprint, chat, cache_dir / "tokens", sink)
    stored, key = maker.rows_of(data.train)
    if data.eval:
        eval_stored, eval_key = maker.rows_of(data.eval)
        train, evaluation = stored.split(), eval_stored.split()
        content = stored.content_sha256("") + eval_stored.content_sha256("")
    else:
        held_out, kept = _hold_out(stored.digests, data.eval_fraction, seed)
        train, evaluation, eval_key = stored.split(kept), stored.split(held_out), f"{data.eval_fraction} {seed}"
        content = stored.content_sha256(json.dumps(held_out))
        if held_out:
            message = f"{len(held_out)} of {len(stored.digests)} rows held out for evaluation"
            sink.emit(Notice("split", message, len(held_out)))
    return PreparedData(train, evaluation, disk.sha256_text(key, eval_key), disk.sha256_text(content))


def _hold_out(digests: Sequence[bytes], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (held out, kept). Rows of equal tokens stay together, in the order of a hash of seed and tokens."""
    wanted = min(len(digests) - 1, max(1, round(fraction * len(digests)))) if fraction else 0
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    held_out: list[int] = []
    for digest in sorted(groups, key=lambda digest: hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()):
        if len(held_out) + len(groups[digest]) <= wanted:
            held_out += groups[digest]
    if wanted > 0 and not held_out:  # every row has more copies than are wanted
        smallest = min(groups.values(), key=len)
        held_out = smallest if len(groups) > 1 else smallest[:1]
    return sorted(held_out), sorted(set(range(len(digests))).difference(held_out))


@dataclass(frozen=True)
class _Maker:
    """Tokenizes sources, or finds them tokenized."""

    data: DataSection
    tokenizer_fingerprint: str
    chat: ChatTokenizer
    cache_dir: Path
    sink: Sink

    def rows_of(self, sources: Sequence[SourceSection]) -> tuple[StoredRows, str]:
        """Stored rows of all sources, and the sha256 of what they are and what made them."""
        key = self._key(sources)
        folder = self.cache_dir / key[:32]
        cached = folder.is_dir()
        if cached and (damage := disk.verify_folder(folder)):
            self.sink.emit(Notice("cache", f"cached tokens in {folder} are damaged ({damage}): tokenizing anew"))
            cached = False
        if not cached:
            disk.sweep_leftovers(self.cache_dir, spare_running=True)
            try:
                self.cache_dir.mkdir(parents=True, exist_ok=True)
                about = {"kind": "tokens"}
                made = disk.publish_folder(folder, lambda place: _Tokenization(self, sources, place).run(), about)
                if made.aside:
                    self.sink.emit(Notice("cache", f"what was there is kept as {made.aside.folder}"))
            except OSError as error:
                raise DataError(
                    f"{self.cache_dir}: cannot write tokenized rows ({error.strerror or error})",
                    "make room or give yourself access there, or name another folder in QLORA_CACHE",
                ) from error
        report = _Report.read(folder)
        self._emit(report, folder if cached else None)
        return open_rows(folder / ROWS_FILE, report.content_sha256), disk.sha256_text(key, report.content_sha256)

    def _key(self, sources: Sequence[SourceSection]) -> str:
        files = [
            [index, file_name(source, file), disk.sha256_file(file)]
            for index, source in enumerate(sources)
            for file in source_files(source)
        ]
        made_by = {
            "code": CODE_VERSION,
            "libraries": [version("transformers"), version("tokenizers"), version("jinja2")],
            "tokenizer": self.tokenizer_fingerprint,
            "template": self.chat.templates,
            "files": files,
            "sources": [[source.format, sorted(source.columns.items())] for source in sources],
            "settings": [self.data.max_length, self.data.truncation, self.data.loss_on, self.data.max_bad_rows],
        }
        return disk.sha256_text(json.dumps(made_by, sort_keys=True))

    def _emit(self, report: _Report, cached_in: Path | None) -> None:
        if cached_in:
            self.sink.emit(Notice("cache", f"rows were tokenized before: read from {cached_in}", report.rows))
        for file, name in report.formats.items():
            self.sink.emit(Notice("format", f"{file}: {name}, told by its columns"))
        for rejected in report.rejected.values():
            self.sink.emit(rejected)
        if report.cut:
            limit = self.data.max_length
            self.sink.emit(Notice("truncation", f"{report.cut} rows cut to their first {limit} tokens", report.cut))
        if report.lost_reasoning:
            message = f"{report.lost_reasoning} answers without their reasoning, which the template drops from history"
            self.sink.emit(Notice("reasoning", message, report.lost_reasoning))
        counts = f"{report.rows} rows, {report.tokens} tokens, {report.trained} of them trained"
        self.sink.emit(Notice("rows", counts, report.rows))


class _Tokenization:
    """One reading of the sources into a folder: rows of tokens, and the report on them."""

    def __init__(self, maker: _Maker, sources: Sequence[SourceSection], folder: Path) -> None:
        self.data, self.chat, self.sink = maker.data, maker.chat, maker.sink
        self.sources = sources
        self.folder = folder
        self.report = _Report()
        self.bad = 0

    def run(self) -> None:
        reasoning_before = self.chat.lost_reasoning
        with RowWriter(self.folder / ROWS_FILE) as writer:
            for index, source in enumerate(self.sources):
                for batch in self._batches(source):
                    if kept := [(*row, index) for row in self._tokenized(source, batch)]:
                        writer.write(kept)
            self.report.content_sha256 = writer.content_sha256()
        self.report.lost_reasoning = self.chat.lost_reasoning - reasoning_before
        if not self.report.rows:
            raise self._nothing_left()
        self.report.write(self.folder)

    def _batches(self, source: SourceSection) -> Iterator[list[tuple[str, Conversation | RowError]]]:
        """Conversations with their places; what is bad stands where it was met, so that the first is reported."""
        files = source_files(source)
        *starts_bytes, total_bytes = accumulate((file.stat().st_size for file in files), initial=0)
        start_of = dict(zip(files, starts_bytes, strict=True))
        formats: dict[str, str] = {}
        batch: list[tuple[str, Conversation | RowError]] = []
        for row, conversation in _conversations(source, formats):
            batch.append((row.where, conversation))
            if len(batch) >= BATCH_ROWS:
                yield batch
                batch = []
                self.sink.emit(Progress("tokenize", start_of[row.file] + row.read_bytes, total_bytes, "B"))
        yield batch
        self.sink.emit(Progress("tokenize", total_bytes, total_bytes, "B"))
        self.report.formats.update(formats)

    def _tokenized(
        self, source: SourceSection, batch: Sequence[tuple[str, Conversation | RowError]]
    ) -> Iterator[tuple[TokenRow, Conversation, str]]:
        encoded = iter(self.chat.encode_many([item for _, item in batch if isinstance(item, Conversation)]))
        for where, item in batch:
            row: TokenRow | RowError | None = next(encoded) if isinstance(item, Conversation) else item
            if isinstance(row, TokenRow) and len(row.input_ids) > self.data.max_length:
                row = self._shortened(source, row, where)
            if isinstance(row, RowError):
                self.bad += 1
                if self.bad > self.data.max_bad_rows:
                    raise _bad_row(where, row, self.data.max_bad_rows)
                self.report.reject(_name(source), row.reason, where)
            elif row is not None:
                assert isinstance(item, Conversation)
                self.report.rows += 1
                self.report.tokens += len(row.input_ids)
                self.report.trained += sum(map(bool, row.loss_weights))
                yield row, item, where

    def _shortened(self, source: SourceSection, row: TokenRow, where: str) -> TokenRow | None:
        """What becomes of a row over max_length: None when it is left out."""
        limit, length = self.data.max_length, len(row.input_ids)
        if self.data.truncation == "error":
            raise DataError(
                f"{where}: the row has {length} tokens, over data.max_length = {limit}",
                'raise data.max_length, shorten the row, or set data.truncation to "drop" or "cut"',
            )
        self.report.long_lengths.append(length)
        reason = f"over max_length = {limit} tokens"
        if self.data.truncation == "cut":
            cut = TokenRow(row.input_ids[:limit], row.loss_weights[:limit])
            if any(cut.loss_weights):
                self.report.cut += 1
                return cut
            reason = f"nothing trained is left of it within max_length = {limit} tokens"
        self.report.reject(_name(source), reason, where)
        return None

    def _nothing_left(self) -> DataError:
        paths = ", ".join(source.path for source in self.sources)
        if not self.report.long_lengths:
            return DataError(f"{paths}: no row is left to use ({self.bad} are bad)", "add rows, or repair these")
        long, limit = self.report.long_lengths, self.data.max_length
        return DataError(
            f"{paths}: no row is left: {len(long)} are over data.max_length = {limit} tokens "
            f"(the longest has {max(long)}, half of them {int(median(long))} or more)",
            'raise data.max_length, split the rows, or set data.truncation = "cut"',
        )


def _conversations(
    source: SourceSection, formats: dict[str, str]
) -> Iterator[tuple[SourceRow, Conversation | RowError]]:
    """The source's rows as conversations. Formats known by the first row of a file are put into `formats` by file."""
    for row in read_rows(source):
        try:
            if isinstance(row.row, RowError):
                raise row.row
            format, name = str(source.format), row.where.rpartition(":")[0]
            if format == "auto" and name not in formats:
                formats[name] = detect_format([key for key, value in row.row.items() if value is not None])
            yield row, to_conversation(row.row, formats.get(name, format))
        except RowError as error:
            yield row, error


def _name(source: SourceSection) -> str:
    """A source's name in reports, which outlive the place where the project's folder lies."""
    return Path(source.path).name


def _bad_row(where: str, error: RowError, max_bad_rows: int) -> DataError:
    if max_bad_rows:
        hint = f"more than data.max_bad_rows = {max_bad_rows} rows are bad: repair them, or raise it"
    else:
        hint = "repair the row, or set data.max_bad_rows to leave out that many"
    return DataError(f"{where}: {error.reason}", hint)
