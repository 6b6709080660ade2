"""Whether a base is still, when a run ends, what it was when it began.

A run keeps the weights in memory, so that it can deliver what it trained whatever becomes of the base's folder in the
meantime: deleted, trained further, another model checked out. But whoever exports the adapter needs that base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from qlora.errors import QloraError
from qlora.events import Notice, Sink, Sinks
from qlora.model.base_folder import BaseFolder, check_folder
from qlora.model.tokenizer_files import read_files

_Stamp = tuple[int, int]  # bytes, and when it was last written


@dataclass(frozen=True)
class BaseWatch:
    """A base as it was: its checked folder, each weight file's stamp, its tokenizer's fingerprint."""

    base: BaseFolder
    stamps: Mapping[str, _Stamp]
    tokenizer: str

    @classmethod
    def begin(cls, base: BaseFolder) -> BaseWatch:
        """Raises TokenizerError when the tokenizer cannot be read."""
        return cls(base, stamps_of(base), read_files(base.path).fingerprint)

    def report(self, sink: Sink) -> None:
        """A notice of what has become of the base, when a run ends; none where nothing was seen."""
        if (change := self._change()) is not None:
            message = f"{self.base.name} has changed while it was trained on ({change})"
            sink.emit(Notice("base", f"{message}: the adapter belongs to the base as it was, which its export needs"))

    def _change(self) -> str | None:
        """What has become of the base, in words; None where nothing was seen. Weights are not read: stamps tell."""
        base = self.base
        if not base.path.is_dir():
            return "its folder is gone"
        try:
            now, tokenizer = check_folder(base.path, base.name, base.commit, Sinks()), read_files(base.path).fingerprint
            stamps = stamps_of(now)
        except QloraError as error:
            return error.what
        except OSError as error:
            return f"it cannot be read ({error.strerror or error})"
        if now.config != base.config:
            return "its config.json is another one"
        if now.fingerprint != base.fingerprint or stamps != self.stamps:
            written = sorted(
                name for name in stamps.keys() | self.stamps.keys() if stamps.get(name) != self.stamps.get(name)
            )
            return f"{written[0]} was written to" if written else "its tensors are others"
        return "its tokenizer is another one" if tokenizer != self.tokenizer else None


def stamps_of(base: BaseFolder) -> dict[str, _Stamp]:
    """Of each file with weights, by its name: what changes when it is written to. Raises OSError."""
    found = {file.name: os.stat(file) for file in {entry.file for entry in base.tensors.values()}}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}
