"""A merge alone as a folder of safetensors: what an export writes before it is verified and gets its card."""

from __future__ import annotations

from pathlib import Path

from qlora.events import Sink
from qlora.export import hf
from qlora.export.merge.merge import Merge
from qlora.export.staging import StagedExport


def write_hf(merge: Merge, out: Path, sink: Sink) -> int:
    """Publish the merged model as `out`, going on where an earlier call was killed. Returns the folder's bytes."""
    with StagedExport.open({"hf": out}, merge.identity(), hf.planned_bytes(merge)) as staged:
        hf.fill(merge, staged, sink)
        return staged.publish("hf")
