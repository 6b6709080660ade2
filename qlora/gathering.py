"""What the processes of a run hold in parts, each one of N, is gathered where it is needed; and who gathers when.

A gather is a collective: all must ask for the same thing at the same time, or all wait for ever. But processes do not
run in step: one has fewer micro-batches, runs out of memory, is asked to stop or fails, and much is process 0's alone
(evaluation, answers, checks). So before each gather every process says over the host's network which thing it wants, or
that it wants none, and what the lowest of those who want something has said is gathered by all. One that is done says
so, and takes part in what others want until all are done: then the session is over. Nobody counts, whatever happens
between two gathers; and since all have said the same, what comes is what was asked for.

A session begins where all know that it does: with a step, with a base that all load, and, where process 0 computes by
itself, with its word (`announce`). Each process's rounds run in one thread, beside what it computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qlora.copy_stream import CopyStream
from qlora.errors import DoesNotFit, QloraError, TrainingStopped
from qlora.processes import Place

T = TypeVar("T")
GATHER_SECONDS = 600  # for bytes of processes that have just said that they are there
POLL_SECONDS = 0.0005  # Python handles signals between looks
SLOW_POLL_SECONDS = 0.01
ALIGNMENT = 16  # bytes: the widest load of a GPU's kernel, as of blobs; a part begins where one may
NOTHING = -1  # what a process says that wants nothing more
_FAILED = -1000  # less its exit code: one that can take part no more

# torch 2.13 calls it otherwise, and warns of the name that earlier ones have.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def finished(begin: Callable[[], Any], seconds: float) -> None:
    """Begin a collective and see it done. Raises RuntimeError where it is not, or a process is gone."""
    began = time.monotonic()
    work = begin()
    while not work.is_completed():
        if (waited := time.monotonic() - began) > seconds:
            raise RuntimeError(f"no answer for {seconds:.0f} s")
        time.sleep(POLL_SECONDS if waited < 1 else SLOW_POLL_SECONDS)  # process 0 may study for hours
    work.wait()


def part_bytes(nbytes: int, size: int) -> int:
    """Of a thing of so many bytes, what each of `size` processes holds: a multiple of ALIGNMENT."""
    return -(-nbytes // (size * ALIGNMENT)) * ALIGNMENT


class Wires(Protocol):
    """To all processes of a run. Raises TrainingStopped where one is gone or does not answer in time."""

    place: Place

    def say(self, number: int, seconds: float) -> list[int]:
        """What each process says, in their order."""

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """All parts, one behind the other, in `whole`: (N * part,) bytes. On a GPU behind the stream's work."""


class Holder(Protocol):
    """Who holds the parts of all things, and has room for one of them."""

    def part(self, number: int) -> Tensor:
        """This process's bytes of a thing."""

    def forget(self) -> None:
        """What came so far is not there any more: all processes begin alike."""

    def room(self) -> tuple[Tensor, CopyStream]:
        """Where a thing may come to that nobody here wants, and by which copies. Nothing is computed from now on."""


class Gathers:
    """Of one process: its side of all gathers. `wait_seconds`: for the slowest of the others to come to its next gather
    in a step; `idle_seconds`: while process 0 works alone, or bases are read."""

    def __init__(self, wires: Wires, announce: Callable[[], object], wait_seconds: float, idle_seconds: float) -> None:
        self.wires, self._announce = wires, announce
        self.tell: Callable[[Any], None] = lambda about: None  # process 0's first word, before anything is loaded
        self.wait_seconds, self.idle_seconds = wait_seconds, idle_seconds
        self.holder: Holder | None = None
        self.is_open = self._alone = False  # a session; one that process 0 has begun with its word
        self._seconds = wait_seconds
        self._lost: QloraError | None = None  # why nobody gathers any more
        self.rounds = self.gathered = 0  # what was said, and what came of it
        self._thread: ThreadPoolExecutor | None = None

    @property
    def place(self) -> Place:
        return self.wires.place

    # --- what is wanted

    def want(self, number: int, slot: Tensor, copies: CopyStream, after: Any) -> Future[Any]:
        """Have a thing in a slot, once the point `after` of what is computed is reached; what comes of it is a point
        behind that, of `copies`. Outside of a session process 0 begins one."""
        if not self.is_open:
            assert self.place.rank == 0, "nobody else computes outside of a session"
            self._announce()
            self._begin(self.wait_seconds)
            self._alone = True
        return self._submit(self._until_it_came, number, slot, copies, after)

    def _until_it_came(self, number: int, slot: Tensor, copies: CopyStream, after: Any) -> Any:
        """Others' wishes come to the same slot, until it is this one's turn."""
        while self._round(number, slot, copies, after) != number:
            pass
        return copies.mark()

    def _round(self, wish: int, slot: Tensor, copies: CopyStream, after: Any) -> int:
        """What all have gathered now; NOTHING where nobody wants anything."""
        if self._lost is not None:
            raise self._lost
        try:
            return self._agreed(wish, slot, copies, after)
        except QloraError as error:
            self._lost = error
            raise

    def _agreed(self, wish: int, slot: Tensor, copies: CopyStream, after: Any) -> int:
        self.rounds += 1
        said = self.wires.say(wish, self._seconds)
        for rank, one in enumerate(said):
            if one <= _FAILED:
                raise failure(self.place, rank, _FAILED - one)
        wished = next((one for one in said if one >= 0), NOTHING)
        if wished == NOTHING:
            return NOTHING
        assert self.holder is not None
        part = self.holder.part(wished)
        with copies.copying(after):
            self.wires.gather(slot[: self.place.size * len(part)], part)
        self.gathered += 1
        return wished

    # --- sessions

    @contextmanager
    def session(self) -> Iterator[None]:
        """All processes compute inside, each what is its own, and leave it together, however it ends for one of them.
        Nothing happens where nothing is held in parts. One inside of another ends by itself, for all as well."""
        if self.holder is None:
            yield
            return
        is_inner, seconds = self.is_open, self._seconds
        if not is_inner:
            self._begin(self.wait_seconds)
        self.holder.forget()
        try:
            yield
        finally:
            self.serve()
            if is_inner:
                self._begin(seconds)

    def shared(self, work: Callable[[], T]) -> Callable[[], T]:
        """The same work, in a session."""

        def within() -> T:
            with self.session():
                return work()

        return within

    @contextmanager
    def loading(self) -> Iterator[None]:
        """As `session`, of what makes the holder: a process that fails inside can take part no more, and says so."""
        self._begin(self.idle_seconds)
        try:
            yield
        except BaseException as error:
            self.fail(error.exit_code if isinstance(error, QloraError) else 1)
            raise
        self.serve()

    def answer(self) -> None:
        """Process 0's word was that it computes alone: take part in what it wants."""
        self._begin(self.idle_seconds)
        self.serve()

    def end(self, seconds: float | None = None) -> None:
        """Process 0 is done with what it did alone, if it did anything."""
        if self._alone and self.is_open:
            self.serve(seconds)

    def serve(self, seconds: float | None = None) -> None:
        """Take part in what others want until all are done."""
        try:
            self._seconds = self._seconds if seconds is None else seconds
            self._submit(self._serve).result()
        finally:
            self.is_open = self._alone = False

    def fail(self, code: int) -> None:
        """Say that this process takes part no more, unless others have said so: why this one ends is known."""
        self.is_open = True
        try:
            with suppress(QloraError):
                self._submit(self._fail, code).result()
        finally:
            self.is_open = self._alone = False

    def _serve(self) -> None:
        assert self.holder is not None, "it was not loaded"
        room, copies = self.holder.room()
        while self._round(NOTHING, room, copies, None) != NOTHING:
            pass

    def _fail(self, code: int) -> None:
        if self._lost is None:
            self._lost = failure(self.place, self.place.rank, code)
            self.wires.say(_FAILED - code, self._seconds)

    def _begin(self, seconds: float) -> None:
        assert not self.is_open, "sessions are not nested"
        self.is_open, self._seconds = True, seconds

    def _submit(self, work: Callable[..., Any], *about: Any) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qlora-gathers")
        return self._thread.submit(work, *about)

    def close(self) -> None:
        """Nothing is gathered any more."""
        self.holder = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None


def failure(place: Place, rank: int, code: int) -> QloraError:
    """What this process says of another one that failed with an exit code."""
    what = f"process {rank} of {place.size} has failed with exit code {code}: its own lines say why"
    if code == DoesNotFit.exit_code:
        return DoesNotFit(what, "every card must hold its part: lower data.max_length or lora.r, or leave it out")
    return TrainingStopped(what, "see to it, then go on with mode='resume'")


_OF_RUN: ContextVar[Gathers | None] = ContextVar("qlora_gathers", default=None)


@contextmanager
def loading(shards: int, about: Any) -> Iterator[None]:
    """While each of `shards` processes loads what it holds a part of; where process 0 begins with it, it tells the
    others `about` it."""
    gathers = _OF_RUN.get()
    if shards == 1 or gathers is None:
        yield
        return
    gathers.tell(about)
    with gathers.loading():
        yield


class Network:
    """The processes of a run over torch.distributed: gloo for what they say, and for what lies on the host; for what
    lies on a GPU the group that sums gradients, which never run beside gathers."""

    def __init__(self, place: Place, cards: Any, gone: Callable[[RuntimeError], TrainingStopped], limit: Any) -> None:
        """`cards`: None on the CPU. `gone`: what is raised then."""
        self.place, self._cards, self._gone = place, cards, gone
        self._words = dist.new_group(backend="gloo", timeout=limit)

    def say(self, number: int, seconds: float) -> list[int]:
        mine, said = torch.tensor([number]), torch.empty(self.place.size, dtype=torch.int64)
        self._until(lambda: _gather(said, mine, group=self._words, async_op=True), seconds)
        return said.tolist()

    def gather(self, whole: Tensor, part: Tensor) -> None:
        if self._cards is None:
            self._until(lambda: _gather(whole, part, group=self._words, async_op=True), GATHER_SECONDS)
            return
        try:  # the stream waits, the host does not: whether it came shows where the next thing is said
            _gather(whole, part, group=self._cards, async_op=True).wait()
        except RuntimeError as error:
            raise self._gone(error) from error

    def _until(self, begin: Callable[[], Any], seconds: float) -> None:
        try:
            finished(begin, seconds)
        except RuntimeError as error:
            # What is under way on a GPU ends with it: who waits for the device is told.
            if self._cards is not None and (abort := getattr(self._cards, "abort", None)) is not None:
                abort()
            raise self._gone(error) from error


def of_run() -> Gathers | None:
    """This process's side of the gathers of the run under way; None where it is alone."""
    return _OF_RUN.get()


@contextmanager
def taken(gathers: Gathers) -> Iterator[None]:
    """Inside the block, `of_run` answers with `gathers`."""
    token = _OF_RUN.set(gathers)
    try:
        yield
    finally:
        _OF_RUN.reset(token)
        gathers.close()
