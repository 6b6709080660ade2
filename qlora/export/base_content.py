"""The content of a base, known before an export or taken while its merge reads the tensors: no pass of its own.

A pass before the first byte is written takes as long as copying the base does. Here the thread that reads ahead hashes
each block of rows and checks its values; what no merge has read by the time somebody asks is read then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blake3 import blake3
from torch import Tensor

from qlora import device
from qlora.disk import sha256_text
from qlora.events import Sink
from qlora.export import base_check
from qlora.export.artifacts import Source
from qlora.model import identity
from qlora.model.base_folder import BaseFolder
from qlora.model.base_watch import stamps_of
from qlora.model.identity import BaseIdentity
from qlora.model.meta_model import taken_tensors
from qlora.model.tensors import TensorEntry, as_bytes, refuse_not_finite, total_bytes
from qlora.page_cache import LeftAsFound


def left_as_found(base: BaseFolder, passes: int) -> LeftAsFound | None:
    """What reads a base so that it does not stay in the page cache, where nobody would find it there: it is read once
    in all, or is too large. Of a file larger than the cache the beginning has left it when the end comes in; half of
    the memory is what others may want."""
    too_large = total_bytes(base.tensors.values()) > device.available_ram() // 2
    return LeftAsFound() if passes < 2 or too_large else None


class BaseContent:
    """Of a source's base: its identity, with the hash of all bytes that the model takes.

    `known` is what loading the base has found; None where it was not loaded.
    """

    def __init__(self, source: Source, sink: Sink, known: BaseIdentity | None = None) -> None:
        self.source, self.sink = source, sink
        self._known = known
        self._digests: dict[str, bytes] = {}
        self._taken = {} if known is not None else taken_tensors(source.base, source.meta_model)
        self._stands_for = self._staged_as()

    def staged_as(self) -> dict[str, str]:
        """What of the base a half-written export must share with one that goes on with it.

        Where the content is not known yet, that is what a sample of it says, and the times of its files: what was read
        by the export before is not read again for its values. An adapter that knows its base by shapes alone was
        trained by a version whose half-written exports do so too.
        """
        return self._stands_for

    def watched(self, tensor: str, entry: TensorEntry) -> Callable[[Tensor], None] | None:
        """What is to be called with all rows of a tensor, block by block from the first on; None: nothing."""
        taken = self._taken.get(tensor)
        if taken is None or tensor in self._digests or (taken.offset, taken.shape) != (entry.offset, entry.shape):
            return None
        digest, left = blake3(), entry.nbytes

        def see(rows: Tensor) -> None:
            nonlocal left
            refuse_not_finite(tensor, entry, rows)
            digest.update(as_bytes(rows))
            left -= rows.nbytes
            if not left:
                self._digests[tensor] = digest.digest()

        return see

    def identity(self) -> BaseIdentity:
        """With the content; what was not watched is read now. Raises ExportError for another base than was trained on,
        ModelError for weights that are not finite.
        """
        if self._known is None:
            config = self.source.base.config
            found = identity.read_through(config, self._taken, self.sink, self._digests)
            base_check.refuse_another(self.source, found)
            self._known, self._taken = found, {}
        return self._known

    def _staged_as(self) -> dict[str, str]:
        source = self.source
        if source.origin.identity is None and source.origin.fingerprint is not None:
            return {}
        if self._known is not None:
            return {"content": str(self._known.content), "config": self._known.config}
        door = identity.at_the_door(source.base.config, self._taken)
        stamps: dict[str, Any] = stamps_of(source.base)
        return {"sampled": door.sampled, "config": door.config, "files": sha256_text(repr(sorted(stamps.items())))}
