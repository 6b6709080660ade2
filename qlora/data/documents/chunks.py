"""Documents to passages: sections by headings, then blocks, then sentences, of a bounded number of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from qlora.data.documents.document import Document

LIMIT = 400  # tokens of a passage, the path of its headings included
PATH_SIGN = " › "


@dataclass(frozen=True)
class Passage:
    """What is shown and asked about at once.

    `document` is the shown path of the file that it stands in. `headings` is the path to its section, outermost first.
    `sentences` are the units that are asked about: sentences, list items, table rows (each with the header's words in
    it: `Code: E41 | Meaning: no water`), lines of code. `text` is what a model reads: the path of headings, an empty
    line, then the section's own text. `about` and `language` are the document's.
    """

    document: str
    headings: tuple[str, ...]
    sentences: tuple[str, ...]
    text: str
    about: str
    language: str

    @cached_property
    def key(self) -> str:
        """Hex sha256 of what it says, wherever it stands: a passage that moves to another file keeps its key."""
        said = [self.text, self.sentences, self.about, self.language]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def passages(document: Document, count_tokens: Callable[[str], int], limit: int = LIMIT) -> list[Passage]:
    """The document's passages in order, each of at most `limit` tokens; every word of it stands in one of them."""
    raise NotImplementedError
