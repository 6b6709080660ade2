"""Records of a study as lines of JSON: appended, synced, and read back as if a stranger had written them.

A line is whole or it is not there: what a killed process left half written is cut off when the file is opened to go on.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from qlora import disk, files, foreign_json
from qlora.errors import RunFolderError

MAX_BYTES = 4 << 30  # of one file: 100 pages have 2 MB
MAX_LINE = 8 << 20  # a passage's questions and answers: 1,000 of them have 1 MB
_ANEW = "move the study's folder away, and study anew"


class Keyed(Protocol):
    """A record: a dataclass of plain values. `key`: a hash of all that it follows from."""

    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=Keyed)


class Store(Generic[R]):
    """The records of one file by their keys. Of two with one key the later counts."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        """Reads what is there, and cuts off a torn last line.

        Raises RunFolderError for a file that is none of ours, with its line, and where it cannot be opened.
        """
        self.path, self.kind = path, kind
        self.records: dict[str, R] = {}
        whole = self._read()
        if whole is not None:
            with disk.open_to_write(path, "existing") as file:
                file.truncate(whole)

    def get(self, key: str) -> R | None:
        return self.records.get(key)

    def append(self, record: R) -> None:
        """Writes a record as a line and has it on the disk before it returns."""
        plain = asdict(record)  # type: ignore[call-overload]
        line = json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        append_synced(self.path, line)
        # As a later process reads it: half a surrogate has become a question mark.
        self.records[record.key] = foreign_json.checked_line(self.kind, line, str(self.path))

    def _read(self) -> int | None:
        """The length of what is whole, where something torn follows it; else None."""
        try:
            if not self.path.exists():
                return None
            whole = 0
            with files.open_to_read(self.path, MAX_BYTES) as file:
                number = 0
                while line := file.readline(MAX_LINE + 1):
                    number += 1
                    if not line.endswith(b"\n"):
                        if len(line) > MAX_LINE:
                            raise RunFolderError(f"{self.path}:{number}: the line is too long to be a study's", _ANEW)
                        return whole
                    whole += len(line)
                    where = f"{self.path}:{number}"
                    record = foreign_json.checked_line(self.kind, line, where)
                    self.records[record.key] = record
            return None
        except (foreign_json.ForeignFileError, files.UnsafePathError) as error:
            raise RunFolderError(str(error), _ANEW) from error
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be read ({error.strerror or error})", _ANEW) from error


def append_synced(path: Path, data: bytes) -> None:
    """Appends to a file of ours, made where there is none, and waits until it is on the disk."""
    with disk.open_to_write(path, "append") as file:
        files.write_all(file, data)
        os.fsync(file.fileno())
