"""A recipe's documents, read: which files they are, each parsed out of this process, and what was left out.

A file that the user named itself is an error where it cannot be read. One that was found in a folder or by a pattern is
left out, by name and with its reason; where that leaves nothing of a source, it is an error again.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from qlora import files
from qlora.data.documents.blocks import as_text
from qlora.data.documents.document import WORDS_PER_PAGE, Document, Documents, LeftOut
from qlora.data.documents.kinds import KINDS
from qlora.data.documents.language import LANGUAGES, language_of
from qlora.data.documents.parsed import NotReadable
from qlora.data.documents.parser import Parser, parser
from qlora.data.documents.words import count_words
from qlora.data.source_files import EXAMPLES, SourceFile, find_files
from qlora.errors import DataError
from qlora.events import Notice, Progress, Sink
from qlora.shown import one_line
from qlora.units import counted

TOPIC = "documents"
MAX_CHARACTERS = 512 << 20  # of all documents together, which are held in memory
_LEAVE_OUT = "make it anew from its source, or leave it out"
_TWICE = "the same file as one before"


class DocumentSource(Protocol):
    """A `[[data.documents]]` table of a recipe: `path` is absolute by now (file, glob or folder).

    `language` is "auto" where it is to be told from the text.
    """

    @property
    def path(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def language(self) -> str: ...


def read_documents(sources: Sequence[DocumentSource], sink: Sink) -> Documents:
    """All documents of `sources`; what is left out is a notice, with its count.

    Raises DataError for a file that was named itself and cannot be read, where nothing is left of a source, and where a
    package is missing that a kind of file needs.
    """
    reading = _Reading(sink)
    with parser() as opened:
        for source in sources:
            reading.source(source, opened)
    reading.tell()
    return Documents(tuple(reading.documents), tuple(reading.left_out))


class _Reading:
    """One reading of all sources: what was read so far."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.documents: list[Document] = []
        self.left_out: list[LeftOut] = []
        self.seen: set[tuple[str, str]] = set()  # sha256 and `about` of what was read
        self.characters = 0

    def source(self, source: DocumentSource, opened: Parser) -> None:
        found = find_files(source.path, KINDS, count_others=True)
        for what, count, names in found.left_out:
            self.left_out.append(LeftOut(", ".join(names) + ", …" * (count > len(names)), what, count))
        _check_packages(found.files)
        named = Path(source.path).expanduser().is_file()
        folder = "" if named else _folder_of(source.path)
        failed: list[tuple[str, NotReadable]] = []
        for number, file in enumerate(found.files):
            self.sink.emit(Progress("read documents", number, len(found.files), "files"))
            shown = f"{folder}{file.name}"
            try:
                self.file(file, shown, source, opened)
            except NotReadable as error:
                if named:
                    raise DataError(f"{shown}: {error.reason}", error.hint) from None
                failed.append((shown, error))
                self.left_out.append(LeftOut(shown, error.reason))
        self.sink.emit(Progress("read documents", len(found.files), len(found.files), "files"))
        if len(failed) == len(found.files):
            first, cause = failed[0]
            what = f"{source.path}: none of its {len(failed):,} documents can be read; {first}: {cause.reason}"
            raise DataError(what, cause.hint)

    def file(self, file: SourceFile, shown: str, source: DocumentSource, opened: Parser) -> None:
        """Read one file. Raises NotReadable."""
        data = _bytes_of(file)
        sha256 = hashlib.sha256(data).hexdigest()
        if (sha256, source.about) in self.seen:
            self.left_out.append(LeftOut(shown, _TWICE))
            return
        parsed = opened.parse(file.ending, data)
        left_out = tuple(LeftOut(shown, what, count) for what, count in parsed.left_out)
        text = as_text(parsed.blocks)
        self.characters += len(text)
        if self.characters > MAX_CHARACTERS:
            what = f"{shown}: with it the documents have more than {MAX_CHARACTERS:,} characters"
            raise DataError(what, "give fewer documents, or only the ones that matter")
        pages = parsed.pages or max(1, -(-count_words(text) // WORDS_PER_PAGE))
        told = source.language if source.language in LANGUAGES else "other"
        language = language_of(text) if source.language == "auto" else told
        blocks = tuple(parsed.blocks)
        self.documents.append(Document(shown, sha256, pages, source.about, language, blocks, left_out))
        self.seen.add((sha256, source.about))

    def tell(self) -> None:
        """What was read, and each reason for leaving something out with its count and the first names."""
        pages = sum(document.pages for document in self.documents)
        count = len(self.documents)
        told = f"{counted(count, 'document')} read, {counted(pages, 'page')}"
        self.sink.emit(Notice(TOPIC, told, count))
        others = [document.path for document in self.documents if document.language == "other"]
        if others:
            names = ", ".join(others[:EXAMPLES]) + ", …" * (len(others) > EXAMPLES)
            known = ", ".join(name for name in LANGUAGES if name != "other")
            message = f"in another language than {known}, or with too little text to tell: {len(others):,} ({names})"
            self.sink.emit(Notice(TOPIC, message, len(others)))
        parts = [part for document in self.documents for part in document.left_out]
        for found, of in ((self.left_out, "left out"), (parts, "of documents left out")):
            reasons: dict[str, list[LeftOut]] = defaultdict(list)
            for item in found:
                reasons[item.reason].append(item)
            for reason, items in reasons.items():
                names = ", ".join(item.where for item in items[:EXAMPLES]) + ", …" * (len(items) > EXAMPLES)
                total = sum(item.count for item in items)
                self.sink.emit(Notice(TOPIC, f"{of}: {reason}: {total:,} ({names})", total))


def _folder_of(path: str) -> str:
    """What stands in front of the names of a folder's files: `manuals` and `prices` may each hold `index.md`."""
    folder = Path(path)
    return f"{one_line(folder.name)}/" if folder.is_dir() and folder.name else ""


def _check_packages(found: Sequence[SourceFile]) -> None:
    for file in found:
        kind = KINDS[file.ending]
        if missing := [name for module, name in kind.packages if find_spec(module) is None]:
            what = f"{file.name}: {kind.name} files are read by {' and '.join(missing)}, which is not installed"
            raise DataError(what, 'pip install "qlora[documents]"')


def _bytes_of(file: SourceFile) -> bytes:
    """All of a file. Raises NotReadable where it is empty, too large, cannot be opened, or changed meanwhile."""
    kind = KINDS[file.ending]
    if not file.size_bytes:
        raise NotReadable("the file is empty", "remove it, or name the right file in path")
    if file.size_bytes > kind.max_bytes:
        what = f"{file.size_bytes:,} bytes are too many for a file of {kind.name} (at most {kind.max_bytes:,})"
        raise NotReadable(what, "split it into parts, or leave it out")
    try:
        with file.open() as opened:
            return opened.read(file.size_bytes + 1)
    except DataError as error:
        raise NotReadable(error.what.removeprefix(f"{file.name}: "), error.hint) from None
    except (OSError, files.UnsafePathError) as error:
        raise NotReadable(str(error), _LEAVE_OUT) from None
