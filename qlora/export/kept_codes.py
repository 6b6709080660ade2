"""A merge onto a base in 4 bit takes the codes that a training has kept, where they are there: none is made anew.

What is kept is what loading made of the very bytes that this base has (`model.base_cache`), and a merge makes the same:
an export is the same to the byte with it and without. It saves the quantization and three quarters of the reading.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from qlora.events import Notice, Sink
from qlora.export.artifacts import Source
from qlora.export.base_content import BaseContent
from qlora.model.base_cache import places
from qlora.model.base_cache.contents import Contents
from qlora.model.base_cache.keeping import Keeping
from qlora.model.base_cache.reading import Damaged, OneByOne
from qlora.model.load import swap_all_linear
from qlora.model.nf4 import Quantized


@dataclass
class KeptCodes:
    """The codes of a kept base; None for each weight from the first on that turns out to be damaged."""

    weights: OneByOne | None
    sink: Sink

    def read(self, parameter: str) -> Quantized | None:
        if self.weights is None:
            return None
        try:
            return self.weights.read(parameter)
        except Damaged as damage:
            self.weights = None
            message = f"the base in 4 bit is not read from the cache ({damage}): it is made of the original"
            self.sink.emit(Notice("cache", message))
            return None


@contextmanager
def opened(source: Source, content: BaseContent, sink: Sink) -> Iterator[KeptCodes | None]:
    """What is kept of the source's base for the time of the block, None where nothing is.

    Its `content` is asked for where a sample of it is kept: a merge onto what is kept reads none of the base's weights.
    """
    base, quantization = source.base, source.origin.quantization
    kept = None
    if quantization.type != "none" and not base.stored_4bit and base.cache is not False:
        meta_model = replace(source.meta_model, model=copy.deepcopy(source.meta_model.model))
        swap_all_linear(meta_model, base, quantization)
        kept = Keeping(Contents(base, meta_model, quantization), sink).kept(content.identity)
    if kept is None:
        yield None
        return
    with places.using(kept.folder):
        sink.emit(Notice("cache", "the merge reads the base in 4 bit from the cache"))
        yield KeptCodes(OneByOne(kept, source.device), sink)
