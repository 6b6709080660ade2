"""A channel over gloo as it is, of one process; of several: test_follower.py, test_sharded_run.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from qlora.errors import TrainingStopped
from qlora.processes import Place
from qlora.ranks import Rank
from qlora.training.channel import Channel
from tests.together import free_port


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    made = Channel(Place(0, 1, 0, 1), torch.device("cpu"))
    yield made
    made.close()
    if dist.is_initialized():  # one that was lost is left as it is
        dist.destroy_process_group()


def test_words_ranks_and_numbers_arrive_as_they_were_sent(channel: Channel) -> None:
    word = {"do": "step", "scale": None, "name": "Zürich 10⁻³", "rate": 0.1}
    assert channel.tell(word) == word
    own = Rank(name="ä" * 200, on_card=True, total_bytes=24 << 30, free_bytes=23 << 30, capability=86, host_bytes=None)
    assert channel.tell_ranks(own) == (own,), "the longest name that a card may have fits into its place"
    values = torch.tensor([3, 1 << 62])
    for exchange in (channel.largest, channel.collect, channel.copy):
        exchange(values)
    assert values.tolist() == [3, 1 << 62]
    sums = torch.tensor([0.5, -0.0])
    channel.add(sums)
    assert sums.tolist() == [0.5, 0.0]


def test_nothing_is_asked_of_a_channel_that_was_lost(channel: Channel) -> None:
    channel._lose(RuntimeError("Connection reset\nby peer"))
    with pytest.raises(TrainingStopped, match=r"process 0.*gone or does not answer \(as was seen before\)") as caught:
        channel.tell({"do": "end"})
    assert "mode='resume'" in caught.value.hint


def test_closing_twice_is_closing(channel: Channel) -> None:
    channel.close()
    channel.close()
    assert not channel.is_open
