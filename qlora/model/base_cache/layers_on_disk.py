"""Layers of a streamed model that stay on the disk, where the host's memory would not hold all of them.

A blob of a kept base is what a slot is given, byte for byte: it is read from there for as long as the model lives, and
nobody makes room with its folder meanwhile. A layer that is not kept yet is written once, as soon as it is loaded, into
a folder of this process beside the kept ones; so all of them are never in memory at once. That folder goes as soon as
the base has been kept, and else with the model.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from qlora import disk, files
from qlora.copy_stream import CopyStream
from qlora.errors import UserError
from qlora.events import Notice, Sink
from qlora.model.base_cache import places
from qlora.model.base_cache.record import BlobRecord, Record, dtype_name
from qlora.model.layer_blobs import LayerWeights, Layout
from qlora.model.tensors import as_bytes
from qlora.model.weight_stores import Arriving, DiskStore

# Of the RAM that is free, what blobs may fill; else they stay on the disk. The planner lets 0.9 of it wait there
# (`memory/estimate.py`); the 0.2 between are for what cannot be on the disk: embeddings and inputs of layers (Llama 70B
# at 4,096 tokens: 2.0 and 5.0 GiB, where its blobs are 36 GiB and so need 51 GiB).
RAM_SHARE = 0.7


class _File(NamedTuple):
    path: Path
    layout: Layout
    blake3: str


class LayersOnDisk:
    """A store of the layers `names` that is filled while they are loaded. `why` it is this one is said in the end."""

    def __init__(self, names: Sequence[str], why: str, device: torch.device) -> None:
        self._names, self._why, self._device = tuple(names), why, device
        self._files: list[_File | None] = [None] * len(names)
        self._folder: Path | None = None  # of the kept base
        self._blobs: dict[str, BlobRecord] = {}
        self._leave: Callable[[], Any] = _nothing
        self._own: Path | None = None
        self._drop_own: Callable[[], Any] = _nothing
        self._store: DiskStore | None = None

    @property
    def host_bytes(self) -> int:
        return self._store.host_bytes if self._store is not None else 0

    # --- where they are

    def read_from(self, folder: Path, record: Record) -> None:
        """Layers that will be put, or were, are those of a kept base, which is in use until `leave` or `close`."""
        self.leave()
        using = ExitStack()
        using.enter_context(places.using(folder))
        self._leave = weakref.finalize(self, using.close)
        self._folder, self._blobs = folder, {blob.layer: blob for blob in record.blobs}
        if self._store is None:
            return
        found = [self._kept(number, one.layout) or one for number, one in enumerate(self._files) if one is not None]
        self._files = list(found)
        self._open()
        if all(one.path.parent == folder for one in found):
            self._drop_own()

    def leave(self) -> None:
        """What is kept is not to be read."""
        self._folder, self._blobs = None, {}
        self._leave()

    # --- as a store

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.cpu()

    def put(self, layer: int, weights: LayerWeights) -> None:
        """A layer's weights are on the host: its file is what is kept of it, else one that is written now."""
        self._files[layer] = self._kept(layer, weights.layout) or self._written(layer, weights)

    def settle(self, sink: Sink) -> None:
        self._open()
        total = len(self._files)
        kept = sum(one is not None and one.path.parent == self._folder for one in self._files)
        where = "those of the kept base" if kept == total else "written for this run"
        sink.emit(Notice("memory", f"{self._why}: layers are read from files, {where}, in every pass", total))

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        assert self._store is not None, "it was closed, or never settled"
        return self._store.send(layer, slot, copies, after)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None
        self._drop_own()
        self.leave()

    # --- files

    def _open(self) -> None:
        """Nothing is on its way from the files that were read so far."""
        if self._store is not None:
            self._store.close()
        found = [one for one in self._files if one is not None]
        paths, sizes, hashes = zip(*((one.path, one.layout.nbytes, one.blake3) for one in found), strict=True)
        self._store = DiskStore(paths, sizes, hashes, self._device)

    def _kept(self, layer: int, layout: Layout) -> _File | None:
        """The kept base's file of a layer, where each tensor lies in it as a slot has it."""
        blob = self._blobs.get(self._names[layer])
        if blob is None or self._folder is None or blob.bytes != layout.nbytes:
            return None
        there = [(piece.name, piece.part, piece.dtype, tuple(piece.shape), piece.offset) for piece in blob.pieces]
        wanted = [(one.name, one.part, dtype_name(one.dtype), one.shape, one.offset) for one in layout.pieces]
        return _File(self._folder / blob.file, layout, blob.blake3) if there == wanted else None

    def _written(self, layer: int, weights: LayerWeights) -> _File:
        """Raises UserError where the disk does not take it."""
        blob = weights.pack()
        try:
            path = self._own_folder() / f"layer-{layer:05d}.blob"
            path.unlink(missing_ok=True)  # of a kept base that turned out to be damaged
            with disk.open_to_write(path, "new", 0o600) as file:
                files.write_all(file, as_bytes(blob))
        except (OSError, files.UnsafePathError) as error:
            what = f"layers that the memory does not hold cannot be written ({getattr(error, 'strerror', 0) or error})"
            raise UserError(what, f"make room in {places.root()}, or name another folder in QLORA_CACHE") from error
        return _File(path, weights.layout, blake3(as_bytes(blob)).hexdigest())

    def _own_folder(self) -> Path:
        if self._own is None:
            self._own = disk.hidden(places.root() / "layers", "tmp")  # swept where this process is killed
            self._own.mkdir(mode=0o700, parents=True)
            self._drop_own = weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
        return self._own


def _nothing() -> None:
    """Nothing is held."""
