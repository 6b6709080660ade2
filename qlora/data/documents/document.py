"""What reading gives: documents, and what of them was left out and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora.data.documents.blocks import Block, as_text

WORDS_PER_PAGE = 400  # measured: 574 tokens a page of running text, at 1.4 tokens a word


@dataclass(frozen=True)
class LeftOut:
    """Something that was not read. `where`: the document's shown path, with the place in it where there is one.

    `count` is in what `reason` names: pages, lines, files.
    """

    where: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Document:
    """One file, read.

    `path` is for showing: below the source's folder, with nothing in it that steers a terminal. `sha256` is of the
    file's bytes, in hex. `pages`: of a PDF its pages, else words / WORDS_PER_PAGE, at least 1. `about` is the source's
    own word on what it is (may be ""). `language`: en, de, fr, es, zh or other. `left_out`: parts that were not read.
    """

    path: str
    sha256: str
    pages: int
    about: str
    language: str
    blocks: tuple[Block, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def text(self) -> str:
        """All of it as Markdown-like text."""
        return as_text(self.blocks)

    def as_dict(self) -> dict[str, Any]:
        """Its line of a study's `documents.jsonl`: what was read and what was not, without the text."""
        left_out = [asdict(part) for part in self.left_out]
        facts = {"path": self.path, "sha256": self.sha256, "pages": self.pages, "language": self.language}
        return {**facts, "about": self.about, "left_out": left_out}


@dataclass(frozen=True)
class Documents:
    """All documents of a recipe in the order of its sources and of their files; `left_out`: whole files."""

    documents: tuple[Document, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def pages(self) -> int:
        return sum(document.pages for document in self.documents)
