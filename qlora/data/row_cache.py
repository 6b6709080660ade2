"""Where tokenized rows are kept between runs, whose are read again, and the report that lies beside them.

A cache is a folder that others may reach, and tokens that somebody else put there would be trained on unseen. So an
entry is read only when it and every folder up to the cache's root is ours (or root's) and nobody else can write to it,
when its manifest holds, and when it was made for the very key that is asked for. What cannot be read or kept there is
made anew in a folder of our own, for this run alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import Field

from qlora import disk, files
from qlora.data.row_json import RowTooLong
from qlora.data.source_files import EXAMPLES
from qlora.data.token_cache import StoredRows, open_rows
from qlora.data.unread import Counts
from qlora.errors import DataError
from qlora.events import Notice, Rejected, Sink
from qlora.foreign_json import ForeignFileError, ForeignModel, checked, load_object

ROWS_FILE, REPORT_FILE = "rows.arrow", "report.json"
MAX_REASONS = 100  # of one report: a reason quotes the row, so that a million bad rows may have a million of them
OVER = (1.5, 2, 4)
_MAX_BYTES = 64 << 20  # older reports list the length of each row that was left out


@dataclass
class SourceCounts:
    """What became of one source's rows: `rows` are used, `cut` of them shortened.

    `dropped` are over max_length, `rejected` are bad; `reasons` counts both, `sizes` are those of the former. `over`
    counts the rows that are over max_length, cut or dropped, by how often it goes into them: up to OVER[0] times,
    OVER[1], … and more. `longest` is the longest of these in tokens; rows that are too long even to be tokenized are in
    neither.
    """

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    rejected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    over: list[int] = field(default_factory=lambda: [0] * (len(OVER) + 1))
    longest: int = 0
    sizes: list[str] = field(default_factory=list)


@dataclass
class RowReport:
    """What there is to say about a side's rows; stored beside them."""

    content_sha256: str = ""
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by the template, out of trained answers (dropped.py)
    pieces: dict[str, int] = field(default_factory=dict)  # of each text file that was cut: into so many rows
    formats: dict[str, str] = field(default_factory=dict)  # of each file whose format is known by its columns
    remarks: Counts = field(default_factory=dict)  # what rows bring and nothing reads, by file, kind and name
    rejected: dict[tuple[str, str], Rejected] = field(default_factory=dict)  # by source and reason
    by_source: list[SourceCounts] = field(default_factory=list)  # in the recipe's order; older reports have none
    long_lengths: list[int] = field(default_factory=list)  # tokens of the rows over max_length; not stored
    sizes: set[str] = field(default_factory=set)  # reasons of rows that are too long; not stored
    unread: int = 0  # rows that are too long even to be tokenized; not stored

    def reject(self, source: str, reason: str, where: str) -> None:
        if (source, reason) not in self.rejected and len(self.rejected) >= MAX_REASONS:
            reason = "other reasons"
        before = self.rejected.get((source, reason), Rejected(source, reason, 0))
        examples = (*before.examples, where)[:EXAMPLES]
        self.rejected[source, reason] = Rejected(source, reason, before.count + 1, examples)

    def cut_text(self, where: str, rows: int) -> None:
        """Count the rows that a text file, of which one began at `where`, has become."""
        file = where.rpartition(":")[0]
        self.pieces[file] = self.pieces.get(file, 0) + rows

    def leave_out(self, source: str, error: RowTooLong, where: str) -> None:
        self.unread += 1
        self.drop(source, error.reason, where)

    def drop(self, source: str, reason: str, where: str) -> None:
        """Leave out a row that is over max_length; what is bad is rejected."""
        self.sizes.add(reason)
        self.reject(source, reason, where)

    def end_source(self, max_length: int) -> None:
        """All that was counted since the last source ended is the next one's."""
        done, reasons = self.by_source, Counter[str]()
        for (_, reason), entry in self.rejected.items():
            reasons[reason] += entry.count
        for one in done:
            reasons.subtract(one.reasons)
        rows, tokens, trained, cut = (
            getattr(self, name) - sum(getattr(one, name) for one in done)
            for name in ("rows", "tokens", "trained", "cut")
        )
        lengths = self.long_lengths[sum(sum(one.over) for one in done) :]
        over = [0] * (len(OVER) + 1)
        for length in lengths:
            over[sum(length > times * max_length for times in OVER)] += 1
        left_out = +reasons
        dropped = len(self.long_lengths) - self.cut + self.unread - sum(one.dropped for one in done)
        counts = (rows, tokens, trained, cut, dropped, left_out.total() - dropped)
        self.by_source.append(SourceCounts(*counts, dict(left_out), over, max(lengths, default=0), sorted(self.sizes)))

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"rejected": [asdict(entry) for entry in self.rejected.values()]}
        del values["long_lengths"], values["unread"], values["sizes"]
        with files.open_to_write(folder / REPORT_FILE, "new") as file:
            files.write_all(file, json.dumps(values, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> RowReport:
        """Raises ForeignFileError."""
        file = folder / REPORT_FILE
        stored = checked(_StoredReport, load_object(file, _MAX_BYTES), str(file))
        entries = [Rejected(row.source, row.reason, row.count, tuple(row.examples)) for row in stored.rejected]
        rejected = {(entry.source, entry.reason): entry for entry in entries}
        counts = [SourceCounts(**dict(one)) for one in stored.by_source]
        return cls(**dict(stored) | {"rejected": rejected, "by_source": counts})


class _StoredRejected(ForeignModel):
    source: str
    reason: str
    count: int
    examples: list[str]


class _StoredCounts(ForeignModel):
    rows: int
    tokens: int
    trained: int
    cut: int
    dropped: int
    rejected: int
    reasons: dict[str, int]
    over: list[int]
    longest: int
    sizes: list[str]


class _StoredReport(ForeignModel):
    content_sha256: str
    rows: int
    tokens: int
    trained: int
    cut: int
    dropped: dict[str, int] = Field(default_factory=dict)  # older reports have none
    formats: dict[str, str]
    remarks: Counts = Field(default_factory=dict)  # older reports have none
    pieces: dict[str, int] = Field(default_factory=dict)
    rejected: list[_StoredRejected]
    by_source: list[_StoredCounts] = Field(default_factory=list)


@dataclass(frozen=True)
class CachedRows:
    """Rows of tokens and their report; `folder` is where they were found, None where they were made just now."""

    stored: StoredRows
    report: RowReport
    folder: Path | None


@dataclass(frozen=True)
class RowCache:
    """The tokens below a cache's root. `highest_id`: no token is above it."""

    root: Path
    highest_id: int
    sink: Sink

    def rows(self, key: str, write: Callable[[Path], None]) -> CachedRows:
        """The rows of a key: read where they are and can be trusted, else made by `write`, which fills a folder.

        Raises DataError when they can be written nowhere, and what `write` raises.
        """
        try:
            root = self.root.resolve()  # the root is the user's, and may be a link
            entries = root / "tokens"
            reason = files.distrust(root, entries, entries / key[:32])
            if reason is None and (entries / key[:32]).is_dir():
                cached = self._read(entries / key[:32], key)
                if cached is not None:
                    return cached
        except (OSError, RuntimeError) as error:
            reason = f"{self.root}: cannot be looked at ({getattr(error, 'strerror', None) or error})"
        if reason is None:
            try:
                for folder in (root, entries):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                disk.sweep_leftovers(entries, spare_running=True)
                made = disk.publish_folder(entries / key[:32], write, {"kind": "tokens", "key": key})
                if made.aside is not None:
                    self.sink.emit(Notice("cache", f"what was there is kept as {made.aside.folder}"))
                return self._opened(entries / key[:32], None)
            except OSError as error:
                reason = f"{entries}: cannot be written ({error.strerror or error})"
        self.sink.emit(Notice("cache", f"{reason}: rows are tokenized anew, for this run alone"))
        return self._made_for_this_run(write)

    def _read(self, folder: Path, key: str) -> CachedRows | None:
        damage = disk.verify_folder(folder)
        try:
            # Up to version 0.5 a manifest had no key, and the folder's name alone said which rows these are.
            if damage is None and disk.read_manifest(folder).get("key", key) != key:
                damage = "they are those of other rows"
            if damage is None:
                return self._opened(folder, folder)
        except (ForeignFileError, ValueError) as error:
            damage = str(error)
        self.sink.emit(Notice("cache", f"cached tokens in {folder} are not read ({damage}): tokenizing anew"))
        return None

    def _opened(self, folder: Path, found_in: Path | None) -> CachedRows:
        report = RowReport.read(folder)
        stored = open_rows(folder / ROWS_FILE, report.content_sha256, self.highest_id)
        return CachedRows(stored, report, found_in)

    def _made_for_this_run(self, write: Callable[[Path], None]) -> CachedRows:
        place: Path | None = None
        try:
            place = Path(tempfile.mkdtemp(prefix="qlora-rows-"))  # nobody else can enter it
            write(place)
            return self._opened(place, None)
        except OSError as error:
            what = f"{place or tempfile.gettempdir()}: cannot write tokenized rows ({error.strerror or error})"
            hint = "make room or give yourself access there, or name another folder in QLORA_CACHE"
            raise DataError(what, hint) from error
        finally:
            if place is not None:  # the rows are mapped by now, and stay until the process ends
                shutil.rmtree(place, ignore_errors=True)
