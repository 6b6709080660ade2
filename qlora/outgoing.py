"""A file on its way out: what was looked at is what is sent, or nothing is.

Between the look at a file and its last byte's leaving lie minutes or hours, in which another export may take its name.
What the far side would find by its hash has left by then: here a file is known again before each block of it goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora import files
from qlora.errors import ExportError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Outgoing:
    """A file as it is sent: its name in the repository, size and sha256, and a file or bytes to read it from.

    `state` is what `files.state_of` said of the file while it was looked at.
    """

    name: str
    size: int
    sha256: str
    content: Path | bytes
    state: tuple[int, ...] | None = None

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> Outgoing:
        return cls(name, len(data), hashlib.sha256(data).hexdigest(), data)

    def blocks(self, start: int, length: int) -> Iterator[bytes]:
        """`length` bytes from `start` on. Raises ExportError for a file that has become another."""
        if isinstance(self.content, bytes):
            yield self.content[start : start + length]
            return
        try:
            with files.open_to_read(self.content) as file:
                file.seek(start)
                while length and (block := file.read(min(length, BLOCK_BYTES))):
                    if self.state is not None and files.state_of(file) != self.state:
                        raise self._changed("was changed")
                    length -= len(block)
                    yield block
        except (OSError, files.UnsafePathError) as error:
            raise ExportError(
                f"{self.content}: cannot be read any more ({error})", "put it back, or export it again"
            ) from error
        if length:
            raise self._changed("has become shorter")

    def whole(self) -> bytes:
        """All of a file of text. Raises ExportError where it has become another than it was."""
        data = b"".join(self.blocks(0, self.size))
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise self._changed("was changed")
        return data

    def beginning(self, length: int) -> bytes:
        """The first `length` bytes, or all."""
        return b"".join(self.blocks(0, min(length, self.size)))

    def _changed(self, how: str) -> ExportError:
        return ExportError(f"{self.content!s}: {how} while it was sent", "export it again")


def git_hash(data: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
