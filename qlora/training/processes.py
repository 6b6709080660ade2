"""A run of several processes: the micro-batches of a step are dealt to them, and their gradients are added up.

Process 0 runs the loop as if it were alone: it alone has the run's folder, saves and decides. The others follow
(`training/follower.py`): they wait for its word, compute the micro-batches of a step that are theirs by the shares that
it tells (`training/sharing.py`), and make the same update. Each micro-batch's loss is divided by the weight of the
whole step, so the gradients' sum is that of one process, whatever the rows' lengths; it is one `all_reduce` of the flat
fp32 buffer. What is random follows from the step and from the micro-batch's number in it.

Words go by gloo over the host's network (`channel.py`), as JSON, and so do the flags that every process shows before
gradients are summed: one that ran out of memory, was asked to stop or has failed says so there, and nobody waits for it
in NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from qlora import gathering, numerics
from qlora.dealing import Cut, dealt, in_order
from qlora.errors import DoesNotFit, Problem, RecipeError, TrainingStopped
from qlora.events import Notice, Sinks
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import DataSection
from qlora.step.loss import Objective
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopAsked, StopRequest
from qlora.training import dividing, exchanging, handing, reference
from qlora.training.answered import Answer
from qlora.training.channel import LEAVE_SECONDS, Channel
from qlora.training.checkpoint import RunState
from qlora.training.dividing import FINE, NO_MEMORY, STOP, Division, Item, Word
from qlora.training.exchanging import Sums
from qlora.training.memory_plan import MemorySettings
from qlora.training.sharing import Sharing, Stopwatch
from qlora.training.words import of_settings, word_of

if TYPE_CHECKING:
    from qlora.training.setup import Job

Work = Callable[[Cut], list[Tensor]]  # this process's part of a step: the loss of each of all its micro-batches


def refuse_unbuilt(recipe: Recipe) -> None:
    """Raises RecipeError for what several processes do not do yet."""
    if recipe.memory.shard_weights is True and recipe.data.documents:
        what = "the others would load their parts of the base before process 0 has studied: not built with documents"
        raise RecipeError([Problem("memory.shard_weights", what, "take it out, or set memory.stream_weights = true")])


class Partners(Division):
    """The other processes of a run, as the loop knows them: here there are none."""

    def load(self, job: Job, data: DataSection, settings: MemorySettings) -> None:
        """When base, rows and memory are settled."""

    def begin(self, job: Job, micro_batches: int) -> None:
        """When all is settled, and the state that the run begins or goes on with is in the optimizer."""

    def hand(self, first: int, answers: Sequence[Answer]) -> None:
        """What was drawn for the steps from `first` on, counted from 0, and how it was judged, is theirs too."""

    def cut(self, _state: RunState, lengths: Sequence[int], settings: MemorySettings) -> Cut:
        """The micro-batches of a step whose packs have so many tokens, and whose they are."""
        return in_order(len(lengths), settings.micro_batch_size)

    def mine(self, _micro_step: int) -> bool:
        """Whether this process computes that micro-batch of the step under way."""
        return True

    def gather(self, state: RunState, lengths: Sequence[int], settings: MemorySettings, work: Work) -> list[Tensor]:
        """The loss of each micro-batch of the step, whose gradient is in the optimizer then. `work` does ours."""
        return work(self.cut(state, lengths, settings))

    def after_step(self, state: RunState, _settings: MemorySettings) -> RunState:
        """With what the processes' shares of the next steps follow from."""
        return state

    def update(self, rate: float) -> None:
        """The update that is made here is theirs too."""

    def lost(self) -> None:
        """Where a process is gone, what is done is kept."""

    def end(self) -> None:
        """No step follows."""


class Leader(Partners):
    """Process 0's side."""

    def __init__(
        self,
        channel: Channel,
        optimizer: AdapterOptimizer,
        stop: StopRequest,
        keep: Callable[[], None],
        sums: Sums | None = None,
    ) -> None:
        self.channel, self.optimizer, self.stop, self.keep, self.sums = channel, optimizer, stop, keep, sums
        self._dealing = self._have_state = self._kept = False
        self._owners: tuple[int, ...] = ()  # of the step that is being computed
        self._sharing: Sharing | None = None

    @property
    def sharing(self) -> Sharing:
        assert self._sharing is not None, "`load` comes first"
        return self._sharing

    def load(self, job: Job, data: DataSection, settings: MemorySettings) -> None:
        self._sharing = Sharing.of(settings, self.channel.place.size, job.recipe, job.sink)
        word = word_of(job, data, settings, self._told(settings))
        if self.channel.has_begun:  # of what is shared the others have loaded their parts
            self.channel.tell({"do": "settle"} | {key: word[key] for key in ("packing", "settings")})
            return
        self.channel.tell(word)
        handing.give(self.channel, job.recipe, handing.learnt_by(job))

    def begin(self, job: Job, micro_batches: int) -> None:
        size = self.channel.place.size
        most = -(-micro_batches // size)
        message = f"{size} processes: of {micro_batches} micro-batches a step each computes at most {most}"
        if self.sharing.others:
            message = f"{size} processes with unequal cards: each computes of a step what its speed is worth"
        if idle := max(0, size - micro_batches):
            message += f"; {idle} of them have none: lower train.micro_batch_size or raise train.batch_size"
        summed = exchanging.bytes_of_step(self.optimizer, micro_batches, self.sums)
        job.sink.emit(Notice("processes", f"{message}; {summed / 2**20:,.2f} MiB a step are added up", size))
        self._have_state = False  # what was asked of them before was asked of the untrained model
        if job.recipe.train.objective not in reference.PLAIN:
            handing.give_reference(self.channel, self.channel.tell, job.data)

    def hand(self, first: int, answers: Sequence[Answer]) -> None:
        with self._keeping():
            self._copy_state()
            handing.give_answers(self.channel, self.channel.tell, (first, answers))

    def mine(self, micro_step: int) -> bool:
        return not self._dealing or self._owners[micro_step] == 0

    def cut(self, state: RunState, lengths: Sequence[int], settings: MemorySettings) -> Cut:
        return self.sharing.cut(state, lengths, settings)

    def after_step(self, state: RunState, settings: MemorySettings) -> RunState:
        return self.sharing.after_step(state, settings)

    def _told(self, settings: MemorySettings) -> list[Word]:
        return [of_settings(one) for one in self.sharing.settings(settings)]

    @contextmanager
    def called(self, word: Word, settings: MemorySettings) -> Iterator[None]:
        with self._keeping():
            self._copy_state()
            pieces = {name: getattr(settings, name) for name in ("micro_batch_size", "answers_at_once")}
            self.channel.tell({**word, "settings": [{**one, **pieces} for one in self._told(settings)]})
            if word.get("weights"):
                exchanging.copy_weights(self.channel, self.optimizer)
            with self._dealt():
                yield

    def shared(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
        if not self._dealing:
            return super().shared(items, work)
        return dividing.divided(self.channel, items, work, self._ended)

    def gather(self, state: RunState, lengths: Sequence[int], settings: MemorySettings, work: Work) -> list[Tensor]:
        with self._keeping():
            while (losses := self._gather(state, lengths, settings, work)) is None:
                self.optimizer.zero_gradients()
            return losses

    def _gather(
        self, state: RunState, lengths: Sequence[int], settings: MemorySettings, work: Work
    ) -> list[Tensor] | None:
        """None where another process takes smaller settings, and the step is to be done again."""
        self._copy_state()
        shares, measures = self.sharing.shares(state, settings), self.sharing.measures(state)
        cut = dealt(lengths, shares)
        scale = None if state.loss_scale is None else state.loss_scale.model_dump()
        word: Word = {"do": "step", "step": state.step, "scale": scale, "settings": self._told(settings)}
        self.channel.tell({**word, "shares": shares.model_dump(), "measures": measures})
        self._owners, watch = cut.owners, Stopwatch(self.optimizer.device, measures)
        with self._dealt():
            losses, found, reason = dividing.shown(
                self.channel.gathers.shared(lambda: watch.during(lambda: work(cut))),
                lambda code: exchanging.shown(self.channel, self.optimizer, code, state.step, watch.took),
            )
        if losses is None or found.worst[1] != FINE:
            rank, code = found.worst
            why = f"CUDA out of memory in process {rank} of {len(found.codes)}: see its own lines"
            if code == NO_MEMORY and rank and self.sharing.smaller(rank, why, state.step + 1):
                return None
            self._ended(found.codes, reason)
        if measures:
            self.sharing.measured = cut.work_of(lengths, len(found.codes)), found.took
        together = torch.stack(losses)
        exchanging.add_up(self.channel, self.optimizer, together, found.complete, self.sums)
        return list(together)

    @contextmanager
    def _dealt(self) -> Iterator[None]:
        """Inside, work is shared with the others, who have been told of it."""
        self._dealing = True
        try:
            yield
        finally:
            self._dealing = False

    def _ended(self, codes: list[int], reason: str) -> NoReturn:
        """Raises what comes of a process that is not fine; `reason`: why memory ran out here."""
        rank, code = dividing.worst(codes)
        if code == NO_MEMORY:
            reason = reason if rank == 0 else "see its own lines"
            raise torch.OutOfMemoryError(f"CUDA out of memory in process {rank} of {len(codes)}: {reason}")
        if code == STOP:
            if not self.stop.is_set:
                self.stop.set(15)  # SIGTERM: how a launcher ends processes
            raise StopAsked
        self._failed(rank, code)

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
        run = numerics.of_run()
        numbers = None if run is None else run.model_dump(mode="json")  # the dry run may have decided some
        self.channel.tell({**word, "trained": exchanging.trained(self.optimizer), "numerics": numbers})
        rank, code = exchanging.shown(self.channel, self.optimizer, FINE, step=1).worst
        if code != FINE:
            self._failed(rank, code)
        exchanging.copy_state(self.channel, self.optimizer, counters)
        self._have_state = True

    def _failed(self, rank: int, code: int) -> NoReturn:
        raise gathering.failure(self.channel.place, rank, code)


class Follower(Partners):
    """As the others' own training knows them."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.is_dealing = channel, False
        self.owners: tuple[int, ...] = ()  # of the step under way, as it was told

    def mine(self, micro_step: int) -> bool:
        return not self.is_dealing or self.owners[micro_step] == self.channel.place.rank

    def shared(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
        if not self.is_dealing:
            return super().shared(items, work)
        return dividing.divided(self.channel, items, work, self._ended)

    @contextmanager
    def dealt(self) -> Iterator[None]:
        """Inside, this process does its part of what process 0 has told of."""
        self.is_dealing = True
        try:
            yield
        finally:
            self.is_dealing = False

    def _ended(self, codes: list[int], _reason: str) -> NoReturn:
        if dividing.worst(codes)[1] == NO_MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory in a process of the run")
        raise StopAsked  # process 0 says what is to be done


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
    sharing = Sharing.of(job.memory, channel.place.size, job.recipe, Sinks())
    told = [of_settings(one) for one in sharing.settings(job.memory)]
    channel.tell(word_of(job, job.recipe.data, job.memory, told))
    channel.has_begun = True


def of_run(optimizer: AdapterOptimizer, stop: StopRequest, keep: Callable[[], None], objective: Objective) -> Partners:
    """The partners of the run that is under way, of whose objective each sees a part; `keep` saves its last step."""
    channel = _CHANNEL.get()
    if channel is None:
        return Partners()
    return Follower(channel) if channel.place.rank else Leader(channel, optimizer, stop, keep, Sums.of(objective))
