"""A command that torchrun or `accelerate launch` has started as several processes: the first does it, others follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from qlora import determinism, processes, ranks
from qlora.cli import cards
from qlora.errors import HardwareError
from qlora.events import Sinks
from qlora.processes import Place
from qlora.recipe.reading import Recipe
from qlora.stop import StopRequest

ALONE = {"check": "--check", "verify-resume": "--verify-resume"}


@contextmanager
def joined(place: Place, wanted: str, stop: StopRequest) -> Iterator[bool]:
    """Whether this process is the first, which works inside the block as if it were alone; the others' work is done
    when they come there. Raises HardwareError for what is one process's."""
    if wanted in ALONE:
        what = f"qlora-train {ALONE[wanted]} is one process, and a launcher has started {place.size}"
        raise HardwareError(what, processes.HINT)
    determinism.fix_workspace()  # before CUDA starts; what it is for, process 0 says later
    with processes.taken(place), ExitStack() as stack:
        cards.settle(Sinks())
        from qlora import device
        from qlora.memory import multi_gpu
        from qlora.training.channel import Channel
        from qlora.training.processes import joined as channel_of_run

        channel = Channel(place, device.current())
        told = channel.tell_ranks(multi_gpu.this_rank())
        if place.rank == 0:
            stack.enter_context(ranks.told(told))  # who decides for all
            stack.enter_context(channel_of_run(channel))
            yield True
            return
        from qlora.training.follower import follow

        with channel_of_run(channel):
            try:
                follow(channel, stop)
            finally:
                channel.close()
        yield False


def refuse_unbuilt(recipe: Recipe) -> None:
    """Raises RecipeError for what several processes do not do yet."""
    if processes.of_run().size > 1:
        from qlora.training.processes import refuse_unbuilt

        refuse_unbuilt(recipe)
