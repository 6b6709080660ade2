"""A run of several processes: the micro-batches of a step are dealt to them, and their gradients are added up.

Process 0 runs the loop as if it were alone: it alone has the run's folder, evaluates, saves and decides. The others
follow (`training/follower.py`): they wait for its word, compute micro-batch j of a step where j mod N is their number,
and make the same update. Each micro-batch's loss is divided by the weight of the whole step, so the gradients' sum is
that of one process, whatever the rows' lengths; it is one `all_reduce` of the flat fp32 buffer. What is random follows
from the step and from j.

Words go by gloo over the host's network, as JSON, and so do the flags that every process shows before gradients are
summed: one that ran out of memory, was asked to stop or has failed says so there, and nobody waits for it in NCCL. A
process that is killed closes its connections, which the others notice at once; one that hangs, after WAIT_SECONDS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from qlora import device as hardware
from qlora import gathering
from qlora.errors import DoesNotFit, Problem, RecipeError, TrainingStopped
from qlora.events import Notice
from qlora.gathering import Gathers, Network, finished
from qlora.guarded import Attempt
from qlora.processes import Place
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import DataSection
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopAsked, StopRequest
from qlora.training.checkpoint import RunState
from qlora.training.memory_plan import MemorySettings
from qlora.training.words import Word, of_settings, word_of

if TYPE_CHECKING:
    from qlora.training.setup import Job

JOIN_SECONDS = 600  # for all processes to be there; torchrun starts them within seconds
WAIT_SECONDS = 1800  # for the slowest process's part of a step: its first step may compile kernels
WORD_SECONDS = 86_400  # for process 0's next word: it evaluates, saves and tokenizes alone
LEAVE_SECONDS = 60  # to be told that the run is over
SAME_EVERY = 100  # steps between comparisons of the processes' weights
FINE, NO_MEMORY, STOP = 0, 1000, 1001  # what a process shows; else the exit code of its error


def refuse_unbuilt(recipe: Recipe) -> None:
    """Raises RecipeError for what several processes do not do yet."""
    unbuilt = {
        "train.objective": recipe.train.objective != "sft" and f'"{recipe.train.objective}"',
        "data.documents": bool(recipe.data.documents) and "documents to be learnt by heart",
        "model.compile": recipe.model.compile is True and "true",
    }
    if problems := [
        Problem(key, f"{what}: not built for several processes", "start it as one process, without torchrun")
        for key, what in unbuilt.items()
        if what
    ]:
        raise RecipeError(problems)


class Channel:
    """This process's connections to all others. Raises TrainingStopped where one of them is gone."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.place, self.is_open = place, True
        on_card = hardware.is_card(device)
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=JOIN_SECONDS))
            limit = timedelta(seconds=WORD_SECONDS)
            self._words = dist.new_group(backend="gloo", timeout=limit)
            self._gradients = dist.new_group(backend="nccl", timeout=limit) if on_card else self._words
            wires = Network(place, self._gradients if on_card else None, self._lose, limit)
        except (RuntimeError, ValueError) as error:
            raise _gone(place, " ".join(str(error).split())[:200]) from error
        self.gathers = Gathers(wires, lambda: self._tell({"do": "serve"}), WAIT_SECONDS, WORD_SECONDS)
        self.has_begun = False  # process 0's first word was told
        if on_card:  # NCCL takes its buffers now, so that what is free is known when the run is planned
            self.add(torch.zeros(1, device=device))

    def tell(self, word: Word | None, seconds: float = WORD_SECONDS) -> Word:
        """Process 0's word, to all; what it gathered alone until then is over."""
        self.gathers.end(min(seconds, WAIT_SECONDS))
        return self._tell(word, seconds)

    def _tell(self, word: Word | None, seconds: float = WORD_SECONDS) -> Word:
        encoded = json.dumps(word).encode() if word is not None else b""
        size = torch.tensor([len(encoded)])
        self._do(lambda: dist.broadcast(size, 0, group=self._words, async_op=True), seconds)
        content = torch.frombuffer(bytearray(encoded or bytes(int(size))), dtype=torch.uint8)
        self._do(lambda: dist.broadcast(content, 0, group=self._words, async_op=True), seconds)
        return dict(json.loads(content.numpy().tobytes()))

    def largest(self, values: Tensor) -> None:
        """Each value on the host becomes the largest of all processes'."""
        work = lambda: dist.all_reduce(values, dist.ReduceOp.MAX, group=self._words, async_op=True)  # noqa: E731
        self._do(work, WAIT_SECONDS)

    def add(self, values: Tensor) -> None:
        """Each value on the device becomes the sum of all processes'."""
        work = lambda: dist.all_reduce(values, group=self._gradients, async_op=True)  # noqa: E731
        self._do(work, WAIT_SECONDS)

    def copy(self, values: Tensor) -> None:
        """Values on the host become those of process 0."""
        self._do(lambda: dist.broadcast(values, 0, group=self._words, async_op=True), WAIT_SECONDS)

    def close(self) -> None:
        self.gathers.close()
        if self.is_open:
            self.is_open = False
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def _do(self, begin: Callable[[], Any], seconds: float) -> None:
        try:
            if not self.is_open:
                raise RuntimeError("as was seen before")
            finished(begin, seconds)
        except RuntimeError as error:
            raise self._lose(error) from error

    def _lose(self, error: RuntimeError) -> TrainingStopped:
        self.is_open = False  # what is under way cannot be ended in order
        return _gone(self.place, " ".join(str(error).split())[-200:])


def _gone(place: Place, why: str) -> TrainingStopped:
    what = f"{place}: another process of the run is gone or does not answer ({why})"
    return TrainingStopped(what, "look for its own error above, then go on with mode='resume'")


@dataclass
class Shown:
    """What each process shows before gradients are summed."""

    codes: list[int]
    complete: Tensor  # which parameters have a gradient somewhere

    @property
    def worst(self) -> tuple[int, int]:
        """A process that is not fine, and its code: one that failed before one that was asked to stop."""
        order = [code for code in self.codes if code not in (FINE, NO_MEMORY, STOP)] or [
            code for code in (STOP, NO_MEMORY) if code in self.codes
        ]
        return (self.codes.index(order[0]), order[0]) if order else (0, FINE)


def shown(channel: Channel, optimizer: AdapterOptimizer, code: int, step: int) -> Shown:
    """Show how this process's part of a step went, and see the others'."""
    gradients = optimizer.gradients
    complete = [int(key in gradients) for key in optimizer.masters]
    return _shown(channel, code, _digest(optimizer) if step % SAME_EVERY == 0 else 0, complete, step)


def show_failure(channel: Channel, code: int, parameters: int) -> None:
    """The same of a process that has not come so far as to have an optimizer."""
    _shown(channel, code, 0, [0] * parameters, 1)


def _shown(channel: Channel, code: int, digest: int, complete: list[int], step: int) -> Shown:
    size, rank = channel.place.size, channel.place.rank
    values = torch.zeros(2 * size + len(complete), dtype=torch.int64)
    values[rank], values[size + rank], values[2 * size :] = code, digest, torch.tensor(complete)
    channel.largest(values)
    digests = values[size : 2 * size].tolist()
    if len(set(digests)) > 1:
        other = next(number for number, digest in enumerate(digests) if digest != digests[0])
        what = f"step {step}: the weights of process {other} are not those of process 0"
        raise TrainingStopped(what, "the newest checkpoint is whole: go on with mode='resume'; please report this")
    return Shown(values[:size].tolist(), values[2 * size :])


def _digest(optimizer: AdapterOptimizer) -> int:
    sha = hashlib.sha256()
    for master in optimizer.masters.values():
        sha.update(hardware.to_host(master).contiguous().numpy().data)
    return int.from_bytes(sha.digest()[:7], "little") + 1


def add_up(channel: Channel, optimizer: AdapterOptimizer, losses: Tensor, complete: Tensor) -> None:
    """The step's gradient and its micro-batches' losses, of all processes."""
    keys = [key for key, there in zip(optimizer.masters, complete.tolist(), strict=True) if there]
    channel.add(optimizer.flat_gradient(keys))
    channel.add(losses)


def trained(optimizer: AdapterOptimizer) -> str:
    """sha256 of names and shapes of what is trained: processes exchange it in one order, without names."""
    shapes = [(key, list(master.shape)) for key, master in optimizer.masters.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def copy_state(channel: Channel, optimizer: AdapterOptimizer, counters: Mapping[str, int]) -> None:
    """Process 0's masters and moments, in every process; `counters` are its numbers of updates."""
    if channel.place.rank:
        optimizer.updates = dict(counters)  # they decide which moments there are
    tensors, _ = optimizer.state()
    for name in sorted(tensors):
        channel.copy(tensors[name].view(torch.uint8))
    if channel.place.rank:
        optimizer.load_state(tensors, counters)


class Partners:
    """The other processes of a run, as the loop knows them: here there are none."""

    def begin(self, job: Job, data: DataSection, settings: MemorySettings, micro_batches: int) -> None:
        """When rows and memory are settled."""

    def mine(self, _micro_step: int) -> bool:
        """Whether this process computes that micro-batch of the step under way."""
        return True

    def gather(self, _state: RunState, _settings: MemorySettings, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The loss of each micro-batch of the step, whose gradient is in the optimizer then. `work` does ours."""
        return work()

    def update(self, rate: float) -> None:
        """The update that is made here is theirs too."""

    def lost(self) -> None:
        """A process is gone, or has failed: what is done is kept."""

    def end(self) -> None:
        """No step follows."""


class Leader(Partners):
    """Process 0's side."""

    def __init__(
        self, channel: Channel, optimizer: AdapterOptimizer, stop: StopRequest, keep: Callable[[], None]
    ) -> None:
        self.channel, self.optimizer, self.stop, self.keep = channel, optimizer, stop, keep
        self._dealing = self._have_state = self._kept = False

    def begin(self, job: Job, data: DataSection, settings: MemorySettings, micro_batches: int) -> None:
        size = self.channel.place.size
        most = -(-micro_batches // size)
        message = f"{size} processes: of {micro_batches} micro-batches a step each computes at most {most}"
        if idle := max(0, size - micro_batches):
            message += f"; {idle} of them have none: lower train.micro_batch_size or raise train.batch_size"
        job.sink.emit(Notice("processes", message, size))
        word = word_of(job, data, settings)
        if self.channel.has_begun:
            word = {"do": "settle"} | {key: word[key] for key in ("numerics", "packing", "settings")}
        self.channel.tell(word)

    def mine(self, micro_step: int) -> bool:
        return not self._dealing or micro_step % self.channel.place.size == 0

    def gather(self, state: RunState, settings: MemorySettings, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        with self._keeping():
            return self._gather(state, settings, work)

    def _gather(self, state: RunState, settings: MemorySettings, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        self._copy_state()
        scale = None if state.loss_scale is None else state.loss_scale.model_dump()
        self.channel.tell({"do": "step", "step": state.step, "scale": scale, "settings": of_settings(settings)})
        losses, code = None, 1  # what is raised by `work` is shown to the others, who wait for our part
        self._dealing = True
        try:
            with self.channel.gathers.session(), Attempt() as memory:
                losses, code = work(), FINE
            code = NO_MEMORY if losses is None else code
        except StopAsked:
            code = STOP
            raise
        finally:
            self._dealing = False
            found = shown(self.channel, self.optimizer, code, state.step)
        rank, code = found.worst
        if code == NO_MEMORY:
            reason = memory.reason if rank == 0 else "see its own lines"
            raise torch.OutOfMemoryError(f"CUDA out of memory in process {rank} of {len(found.codes)}: {reason}")
        if code == STOP:
            if not self.stop.is_set:
                self.stop.set(15)  # SIGTERM: how a launcher ends processes
            raise StopAsked
        if code != FINE or losses is None:
            self._failed(rank, code)
        together = torch.stack(losses)
        add_up(self.channel, self.optimizer, together, found.complete)
        return list(together)

    def update(self, rate: float) -> None:
        with self._keeping():
            self.channel.tell({"do": "update", "rate": rate})

    def end(self) -> None:
        leave(self.channel)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Where a process is lost or has failed, the last completed step is whole here, and saved."""
        try:
            yield
        except (TrainingStopped, DoesNotFit):
            self._keep()
            raise

    def _keep(self) -> None:
        if not self._kept:
            self._kept = True
            self.optimizer.zero_gradients()
            self.keep()

    def lost(self) -> None:
        if not self.channel.is_open:
            self._keep()

    def _copy_state(self) -> None:
        """Once: see whether all have loaded, and give them the state that the run begins or goes on with."""
        if self._have_state:
            return
        _, counters = self.optimizer.state()
        word = {"do": "state", "counters": counters, "parameters": len(self.optimizer.masters)}
        self.channel.tell({**word, "trained": trained(self.optimizer)})
        rank, code = shown(self.channel, self.optimizer, FINE, step=1).worst
        if code != FINE:
            self._failed(rank, code)
        copy_state(self.channel, self.optimizer, counters)
        self._have_state = True

    def _failed(self, rank: int, code: int) -> NoReturn:
        raise gathering.failure(self.channel.place, rank, code)


class Follower(Partners):
    """As the others' own training knows them."""

    def __init__(self, channel: Channel) -> None:
        self.place = channel.place

    def mine(self, micro_step: int) -> bool:
        return micro_step % self.place.size == self.place.rank


def leave(channel: Channel) -> None:
    """Process 0 tells the others that the run is over, once."""
    if channel.is_open and channel.place.rank == 0:
        with suppress(TrainingStopped):
            channel.tell({"do": "end"}, LEAVE_SECONDS)
        channel.close()


_CHANNEL: ContextVar[Channel | None] = ContextVar("qlora_channel", default=None)


@contextmanager
def joined(channel: Channel) -> Iterator[None]:
    """Inside the block, a run of this process is that of all."""
    token = _CHANNEL.set(channel)
    if channel.place.rank == 0:
        channel.gathers.tell = partial(_begin_early, channel)
    try:
        with gathering.taken(channel.gathers):
            try:
                yield
            finally:
                leave(channel)
    finally:
        _CHANNEL.reset(token)


def _begin_early(channel: Channel, job: Job) -> None:
    """All load at once a base of which each holds a part: process 0's own checks need the others' parts."""
    channel.tell(word_of(job, job.recipe.data, job.memory))
    channel.has_begun = True


def of_run(optimizer: AdapterOptimizer, stop: StopRequest, keep: Callable[[], None]) -> Partners:
    """The partners of the run that is under way; `keep` saves its last completed step."""
    channel = _CHANNEL.get()
    if channel is None:
        return Partners()
    return Follower(channel) if channel.place.rank else Leader(channel, optimizer, stop, keep)
