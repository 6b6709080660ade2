"""Documents as rows of plain text, for format = "documents": one row a file, as every reader of documents gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora.data.documents.read import read_documents
from qlora.data.readers import Item
from qlora.data.row_json import RowError
from qlora.data.source_files import SourceFile
from qlora.errors import DataError
from qlora.events import Sinks


@dataclass(frozen=True)
class _One:
    """A file as a source of documents."""

    path: str
    about: str = ""
    language: str = "auto"


def items(file: SourceFile) -> Iterator[Item]:
    """The file's text; what of it could not be read is a key beside it, which the report on unread keys counts."""
    try:
        (document,) = read_documents([_One(str(file.path))], Sinks()).documents
    except DataError as error:
        yield Item(1, RowError(error.what.removeprefix(f"{file.name}: "), error.hint), file.size_bytes)
        return
    unread = {f"{part.reason} ({part.count})": part.count for part in document.left_out}
    yield Item(1, {"text": document.text, **unread}, file.size_bytes)
