"""When a base is read from the cache, and when it is put there.

A kept base is read where three things hold: the samples of the original's bytes are those that were taken of it, its
files have the sizes and times that they had when all of their bytes were hashed, and each byte of the cache has the
hash that was written down. Samples alone would miss a change of a few rows of the embeddings; where a file was copied
or written to, the original is read once more from front to back, and what it is then decides. Whoever needs to know
what the files hold at this moment (an export that merges into them) reads them through in any case.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qlora import disk, files, lock
from qlora.device import available_ram
from qlora.errors import UserError
from qlora.events import Notice, Progress, Sink
from qlora.foreign_json import ForeignFileError
from qlora.guarded import Attempt
from qlora.model import base_watch, identity
from qlora.model.base_cache import places, record, writing
from qlora.model.base_cache.contents import Contents
from qlora.model.base_cache.layers_on_disk import RAM_SHARE, LayersOnDisk
from qlora.model.base_cache.reading import Damaged, Homes, Kept, KeptBase, Unreadable
from qlora.model.identity import BaseIdentity
from qlora.model.meta_model import taken_tensors
from qlora.units import gib

SHARE = 10  # "auto": all that is kept takes at most this part of what were free without it
WORTH_SHARE = 0.75  # "auto": of the original's bytes, what a kept base has at most
SPARE_BYTES = 256 << 20  # of the disk, left to checkpoints and the like
# Files that were written to so shortly before they are read may be written to again in the same tick of a clock (FAT
# counts in steps of 2 s): their time says nothing yet.
YOUNG_SECONDS = 2.0


@dataclass
class Keeping:
    """One start: `fill` from the cache (then it is `filled`), or else `keep` what was loaded from the original."""

    contents: Contents
    sink: Sink
    filled: bool = field(default=False, init=False)
    layers: LayersOnDisk | None = field(default=None, init=False)  # of a streamed model that RAM is too short for
    _stamps: places.Stamps = field(default_factory=dict, init=False)
    _is_settled: bool = field(default=False, init=False)
    _may_be_there: bool = field(default=False, init=False)  # what is read once more may be what is kept already

    def on_disk(
        self, names: Sequence[str], matrices: Sequence[frozenset[str]], device: torch.device
    ) -> LayersOnDisk | None:
        """For streamed layers, each with its `matrices`, which the host's memory would not hold: they are read from the
        kept base once it is there. None where there are none, or nothing may be kept. Raises UserError where neither
        memory nor disk holds them."""
        if not names or not self._wanted():
            return None
        nbytes = self.contents.bytes_of(
            f"{layer}.{name}" for layer, own in zip(names, matrices, strict=True) for name in own
        )
        free = available_ram()
        if nbytes <= RAM_SHARE * free:
            return None
        bases, needs = places.root(), f"streamed layers take {gib(nbytes)}, of RAM {gib(free)} are free"
        ending, room = self.contents.settings.ending, disk.free_bytes(bases) - SPARE_BYTES
        if room < nbytes and not any(one.folder.name.endswith(ending) for one in places.held(bases)):
            if nbytes <= free:  # as tight as the plan allows it
                self._say(f"{needs}, and {bases} has no room for them: they stay in RAM")
                return None
            hint = "make room there, or name another folder in QLORA_CACHE"
            raise UserError(f"{needs}, and {gib(max(0, room))} in {bases}", hint)
        self.layers = LayersOnDisk(names, needs, device)
        return self.layers

    def fill(
        self,
        place: Callable[[str, Kept], None],
        home_of: Callable[[str], torch.device],
        device: torch.device,
    ) -> BaseIdentity | None:
        """Have `place` put each value of the kept base into the model; which base it is. None where there is none:
        what was placed until then, of one that is damaged, is not to be computed with.

        `home_of`: where a value is to lie; tables of codes are on `device`.
        """
        if not self._wanted():
            return None
        self._stamps, began = base_watch.stamps_of(self.contents.base), time.time_ns()
        newest = max((when for _, when in self._stamps.values()), default=0)
        self._is_settled = began - newest > YOUNG_SECONDS * 1e9
        for kept in self._found():
            try:
                with places.using(kept.folder):
                    if self.layers is not None:
                        self.layers.read_from(kept.folder, kept.record)
                    self._place_all(kept, place, Homes(home_of, device))
            except Damaged as damage:
                if self.layers is not None:
                    self.layers.leave()
                self._set_aside(kept.folder, damage)
                return None
            places.touch(kept.folder)
            read, original = gib(kept.bytes), gib(self.contents.original_bytes)
            self._say(f"the base is read from the cache in 4 bit: {read}, where the original has {original}")
            self.filled = True
            return kept.record.identity
        return None

    def kept(self, known: Callable[[], BaseIdentity]) -> KeptBase | None:
        """What is kept of the base, None where there is nothing; none of it is read yet.

        `known`, its identity in full, is asked for where something is kept of a base that a sample shows to be it.
        """
        if not self._wanted():
            return None
        self._stamps = base_watch.stamps_of(self.contents.base)
        return next((kept for kept in self._found() if kept.record.identity.content == known().content), None)

    def check_room(self) -> None:
        """UserError where memory.cache = true asks for what the disk has no room for. Before weights are read."""
        if self._mode is not True or not self._wanted() or self._may_be_there:
            return
        needed, free = self.contents.kept_bytes, disk.free_bytes(places.root())
        if free < needed + SPARE_BYTES:
            raise UserError(
                f"memory.cache = true: {self.contents.base.name} in 4 bit takes {gib(needed)}, "
                f"and {gib(free)} are free in {places.root()}",
                'make room there, name another folder in QLORA_CACHE, or set memory.cache = "auto"',
            )

    def keep(self, model: Any, known: BaseIdentity) -> None:
        """Put the base that `model` has loaded from the original into the cache, if it is to be there.

        Whatever keeps that from being done is said, and nothing of it is left.
        """
        if self.filled or not self._wanted() or not self._worth_it():
            return
        try:
            if base_watch.stamps_of(self.contents.base) != self._stamps:
                self._say("the base's files were written to while they were read: it is not kept in 4 bit")
                return
            with places.writing(places.root()), Attempt() as memory:
                self._keep(model, known)
            if memory.reason:
                self._say(f"the base could not be kept in 4 bit ({memory.reason}): the next start reads the original")
        except lock.LockHeld:
            self._say("another process keeps a base in the cache: this one is not kept this time")
        except (OSError, UserError, files.UnsafePathError) as error:
            why = getattr(error, "strerror", None) or str(error)
            self._say(f"the base could not be kept in 4 bit ({why}): the next start reads the original again")
        except writing.CannotKeep as error:
            self._say(f"the base is not kept in 4 bit: {error}")

    @property
    def _mode(self) -> places.Mode:
        return self.contents.base.cache

    def _wanted(self) -> bool:
        return self._mode is not False and self.contents.quantization.type != "none"

    def _worth_it(self) -> bool:
        """For "auto": what is small is loaded as quickly without, and what is stored in 4 bit has no more bytes, nor
        much more where its experts are (gpt-oss in MXFP4)."""
        saves = self.contents.kept_bytes <= WORTH_SHARE * self.contents.original_bytes
        small = self.contents.base.stored_4bit or self.contents.original_bytes < places.LEAST_BYTES
        return self._mode is True or (saves and not small)

    def _say(self, message: str) -> None:
        self.sink.emit(Notice("cache", message))

    # --- reading

    def _found(self) -> Iterator[KeptBase]:
        """What is there of this very base in this very form, and may be read."""
        try:
            bases = places.root()
            folders = [one.folder for one in places.held(bases)] if bases.is_dir() else []
        except (OSError, UserError) as error:
            self._say(f"the cache cannot be looked at ({getattr(error, 'strerror', None) or error})")
            return
        for folder in folders:
            if not (places.NAME.fullmatch(folder.name) and folder.name.endswith(self.contents.settings.ending)):
                continue
            try:
                if (kept := self._opened(folder)) is not None:
                    yield kept
            except Damaged as damage:
                self._set_aside(folder, damage)

    def _opened(self, folder: Path) -> KeptBase | None:
        """One of them; None where it is of another base, or not to be trusted. Raises Damaged."""
        try:
            if why := places.distrusted(folder):
                self._say(f"{why}: the base in 4 bit there is not read")
                return None
            sized = record.read(folder)
        except ForeignFileError as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        known, content = sized.record.identity, str(sized.record.identity.content)
        if sized.record.settings != self.contents.settings or not folder.name.startswith(content[:32]):
            raise Damaged("its manifest belongs to another folder")
        if known.model_copy(update={"content": None}) != self._at_the_door:
            return None
        if not places.was_seen(folder, self._stamps):
            self._may_be_there = True
            self._say("the base's files were copied or written to since they were read: they are read once more")
            return None
        kept = KeptBase(folder, sized, self.contents)
        kept.check()
        return kept

    @cached_property
    def _at_the_door(self) -> BaseIdentity:
        base = self.contents.base
        return identity.at_the_door(base.config, taken_tensors(base, self.contents.meta_model))

    def _place_all(self, kept: KeptBase, place: Callable[[str, Kept], None], homes: Homes) -> None:
        done = 0

        def read(count: int) -> None:
            nonlocal done
            done += count
            self.sink.emit(Progress("load", done, kept.bytes, "B"))

        for name, value in kept.values(homes, read):
            place(name, value)

    def _set_aside(self, folder: Path, damage: Damaged) -> None:
        """What is damaged gets out of the way, and the original is read."""
        where = str(folder)
        if not isinstance(damage, Unreadable):
            try:
                where = f"{where}, now {disk.set_aside(folder, places.SET_ASIDE).name}"
            except OSError as error:
                where = f"{where}, which cannot be set aside: {error.strerror or error}"
        self._say(f"the base in 4 bit is not read from the cache ({damage}; {where}): the original is read")

    # --- writing

    def _keep(self, model: Any, known: BaseIdentity) -> None:
        bases, contents = places.root(), self.contents
        folder = bases / f"{str(known.content)[:32]}-{contents.settings.ending}"
        if why := places.distrusted(folder):
            self._say(f"{why}: the base is not kept in 4 bit")
            return
        if not self._is_there(folder, known):
            if not self._has_room(bases):
                return
            size = gib(contents.kept_bytes)
            self._say(f"the base is kept in 4 bit, {size} in {bases}: the next start reads no more than that")
            self._write(folder, model, known)
        if self.layers is not None:
            self.layers.read_from(folder, record.read(folder).record)
        if self._is_settled:
            places.see(folder, self._stamps)

    def _is_there(self, folder: Path, known: BaseIdentity) -> bool:
        """Whether a copy of the original, or the original before it was touched, is kept already."""
        try:
            return record.read(folder).record.identity.content == known.content
        except (ForeignFileError, OSError):
            return False

    def _has_room(self, bases: Path) -> bool:
        """Whether it may be written; what was used longest ago has made room for it. Says why not."""
        needed, free = self.contents.kept_bytes, disk.free_bytes(bases)
        if self._mode is True:
            if free < needed + SPARE_BYTES:
                self._say(f"the base is not kept in 4 bit: {gib(needed)} are needed, {gib(free)} are free in {bases}")
            return free >= needed + SPARE_BYTES
        most = (free + sum(one.bytes for one in places.held(bases))) // SHARE
        for gone in places.make_room(bases, needed, most):
            self._say(f"{gone.folder.name} ({gib(gone.bytes)}), which was used longest ago, made room in the cache")
        there = sum(one.bytes for one in places.held(bases))
        if there + needed > most:
            beside = f" beside {gib(there)} that are there" if there else ""
            self._say(
                f"the base is not kept in 4 bit: {gib(needed)}{beside} are more than a tenth of the free disk "
                f"({gib(most)}); memory.cache = true keeps it all the same"
            )
            return False
        return True

    def _write(self, folder: Path, model: Any, known: BaseIdentity) -> None:
        total, done = self.contents.kept_bytes, 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            self.sink.emit(Progress("keep base", min(done, total), total, "B"))

        temporary = disk.hidden(folder, "tmp")
        temporary.mkdir(mode=0o700)
        try:
            made, sha256 = writing.write(temporary, self.contents, model, known, written)
            disk.publish_filled(temporary, folder, sha256, made.about())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
