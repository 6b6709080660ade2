"""A recipe's documents, read: which files they are, each parsed out of this process, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qlora.data.documents.document import Documents
from qlora.events import Sink


class DocumentSource(Protocol):
    """A `[[data.documents]]` table of a recipe: `path` is absolute by now (file, glob or folder)."""

    @property
    def path(self) -> str: ...

    @property
    def about(self) -> str: ...


def read_documents(sources: Sequence[DocumentSource], sink: Sink) -> Documents:
    """All documents of `sources`; what is left out is a notice, with its count.

    Raises DataError for a file that was named itself and cannot be read, and where nothing is left of a source;
    UserError where a package is missing that a kind of file needs.
    """
    raise NotImplementedError
