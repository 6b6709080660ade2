"""Where the blobs of layers lie while they are not on the device: in the host's memory, or in files.

A GPU copies at the bus's speed from memory that the system leaves in its place, and from other memory at half of that
and with the host waiting. torch pins memory in powers of two (c10's CachingHostAllocator), and the system may refuse
large pieces, or all of them from some size on (Windows: about half of the RAM; WSL: little). So a blob is cut into
pieces of powers of two, at most 512 MiB; where pinning fails once it is not tried again: the rest stays pageable, and a
notice says how much that is.

Files are read, not mapped: one that becomes shorter while it is mapped ends the process, while reading it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from qlora import device as hardware
from qlora import files
from qlora.copy_stream import CopyStream
from qlora.errors import ModelError
from qlora.events import Notice, Sink
from qlora.model.layer_blobs import LayerWeights
from qlora.model.tensors import as_bytes
from qlora.units import MIB

LARGEST_PIECE = 512 * MIB
SMALLEST_PIECE = MIB  # what is left of a blob below it is one piece
STAGING_BLOBS = 2  # one is copied to the device while the next layer is read into the other


class Arriving(Protocol):
    """A blob on its way to a slot."""

    def arrive(self) -> None:
        """What is asked of the device from now on finds it there. Raises what went wrong on the way."""


class Store(Protocol):
    """The blobs of all layers."""

    @property
    def host_bytes(self) -> int:
        """Of the host's memory that it holds."""

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        """Have a layer's blob copied into a slot once the point `after` of what is computed is reached."""

    def close(self) -> None:
        """Nothing is sent any more, and its memory is given back."""


def sizes_of_pieces(nbytes: int) -> list[int]:
    """Powers of two that add up to `nbytes`, but for the last one."""
    sizes = []
    while nbytes >= SMALLEST_PIECE:
        sizes.append(min(LARGEST_PIECE, 1 << (nbytes.bit_length() - 1)))
        nbytes -= sizes[-1]
    return [*sizes, nbytes] if nbytes else sizes


class HostBytes:
    """Room for `nbytes` on the host, in pieces; pinned where a GPU `device` copies from it and the system allows it."""

    def __init__(self, nbytes: int, device: torch.device, pin: bool = True) -> None:
        self.nbytes, self.pinned_bytes = nbytes, 0
        self.pieces: list[Tensor] = []
        on_card = hardware.is_card(device)
        for size in sizes_of_pieces(nbytes) if on_card else [nbytes]:
            piece = torch.empty(size, dtype=torch.uint8)
            taken = hardware.pinned(piece, device) if pin else piece
            pin = taken is not piece  # refused once, refused again
            self.pinned_bytes += size if pin else 0
            self.pieces.append(taken)

    def beside(self, blob: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each part of a `blob`, which is no longer than the room, with its place in it."""
        pairs, at = [], 0
        for piece in self.pieces:
            size = min(piece.nbytes, len(blob) - at)
            if size > 0:
                pairs.append((blob[at : at + size], piece[:size]))
                at += size
        return pairs


class _Copied:
    def __init__(self, copies: CopyStream, mark: Any) -> None:
        self._copies, self._mark = copies, mark

    def arrive(self) -> None:
        self._copies.wait(self._mark)


class HostStore:
    """All blobs in the host's memory; `put` each of them once."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.device = device
        self._blobs: list[HostBytes | None] = [None] * layers
        self._pins = True

    @property
    def host_bytes(self) -> int:
        return sum(blob.nbytes for blob in self._blobs if blob is not None)

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.cpu()

    def put(self, layer: int, weights: LayerWeights) -> None:
        """On the CPU a blob is kept as it is, elsewhere in its own pieces."""
        blob = weights.pack()
        if not hardware.is_card(self.device):
            kept = HostBytes(0, self.device)
            kept.nbytes, kept.pieces = len(blob), [blob]
        else:
            kept = HostBytes(len(blob), self.device, self._pins)
            self._pins = kept.pinned_bytes == kept.nbytes
            for part, place in kept.beside(blob):
                place.copy_(part)
        self._blobs[layer] = kept

    def settle(self, sink: Sink) -> None:
        """One notice of the share that could not be pinned, if there is any."""
        held, pinned = self.host_bytes, sum(blob.pinned_bytes for blob in self._blobs if blob is not None)
        if hardware.is_card(self.device) and pinned < held:
            share = f"the system pins no more memory: {1 - pinned / held:.0%} of the streamed weights"
            sink.emit(Notice("memory", f"{share} are copied more slowly, and the host waits for them"))

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        blob = self._blobs[layer]
        assert blob is not None, f"layer {layer} has no blob"
        return copied(blob.beside(slot[: blob.nbytes]), copies, after)

    def close(self) -> None:
        self._blobs = [None] * len(self._blobs)


class _Read:
    def __init__(self, copies: CopyStream, mark: Future[Any]) -> None:
        self._copies, self._mark = copies, mark

    def arrive(self) -> None:
        self._copies.wait(self._mark.result())


class DiskStore:
    """Blobs in files, one a layer and nothing else in it. A thread reads a layer while the one before is computed.

    `hashes` are the files' BLAKE3, each compared when its file is first read, and once more when its size or time is
    another one than then; "" is not compared.
    """

    def __init__(
        self, paths: Sequence[Path], nbytes: Sequence[int], hashes: Sequence[str], device: torch.device
    ) -> None:
        self._paths, self._nbytes, self._hashes = tuple(paths), tuple(nbytes), tuple(hashes)
        self._compared: list[tuple[int, int] | None] = [None] * len(self._paths)  # size and time of the file then
        count = STAGING_BLOBS if hardware.is_card(device) else 0  # else it is read to where it is computed with
        self._staging = [HostBytes(max(self._nbytes), device) for _ in range(count)]
        self._left: list[Any] = [None] * count  # a point behind the last copy from each
        self._turn = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qlora-layers")

    @property
    def host_bytes(self) -> int:
        return sum(room.nbytes for room in self._staging)

    def send(self, layer: int, slot: Tensor, copies: CopyStream, after: Any) -> Arriving:
        return _Read(copies, self._thread.submit(self._send, layer, slot[: self._nbytes[layer]], copies, after))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._staging = []

    def _send(self, layer: int, blob: Tensor, copies: CopyStream, after: Any) -> Any:
        if not self._staging:
            self._read(layer, [blob])
            return None
        turn = self._turn % len(self._staging)
        self._turn += 1
        if self._left[turn] is not None:
            self._left[turn].synchronize()
        pairs = self._staging[turn].beside(blob)
        self._read(layer, [place for _, place in pairs])
        self._left[turn] = mark = _copy(pairs, copies, after)
        return mark

    def _read(self, layer: int, places: Sequence[Tensor]) -> None:
        """Fills the places with a layer's file. Raises ModelError for one that is not what was written."""
        path, wanted, reason = self._paths[layer], self._hashes[layer], ""
        found = stamp = None
        try:
            with files.open_to_read(path) as file:
                stamp = _stamp(file)
                found = blake3() if wanted and stamp != self._compared[layer] else None
                for place in places:
                    view = as_bytes(place)
                    while view and (count := file.readinto(view)):
                        if found is not None:
                            found.update(view[:count])
                        view = view[count:]
                    reason = "it is shorter than it was" if view else reason
        except (OSError, files.UnsafePathError) as error:
            reason = str(error)
        if not reason and found is not None and found.hexdigest() != wanted:
            reason = "its hash is another one"
        if reason:
            hint = "resume the run: it reads the original where what is kept is damaged"
            raise ModelError(f"{path}: a layer's weights cannot be read ({reason})", hint)
        self._compared[layer] = stamp


def _stamp(file: Any) -> tuple[int, int]:
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def copied(pairs: Sequence[tuple[Tensor, Tensor]], copies: CopyStream, after: Any) -> Arriving:
    """Have each part of a slot copied from its place on the host, behind the point `after` of what is computed."""
    return _Copied(copies, _copy(pairs, copies, after))


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], copies: CopyStream, after: Any) -> Any:
    """Each part of a slot from its place on the host; a point behind it."""
    with copies.copying(after):
        for part, place in pairs:
            part.copy_(place, non_blocking=True)
    return copies.mark()
