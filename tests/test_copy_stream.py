"""Who waits for whom: the order in which a stand-in's streams and events are asked."""

from __future__ import annotations

import pytest
import torch

from qlora.copy_stream import CopyStream
from tests.card import Card, Stream, rehearsal

CPU = torch.device("cpu")


def test_on_a_card_each_waits_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, object, object]] = []
    with rehearsal(monkeypatch, Card()) as card:
        monkeypatch.setattr(Stream, "wait_stream", lambda own, other: said.append(("wait_stream", own, other)))
        monkeypatch.setattr(Stream, "wait_event", lambda own, event: said.append(("wait_event", own, event)))
        stream = CopyStream(CPU)
        with stream.copying():
            copying = card.current_stream()
        computing = card.current_stream()
        assert copying is not computing and said == [("wait_stream", copying, computing)]
        mark = stream.mark()
        assert mark.is_recorded
        stream.wait(mark)
        assert said[1:] == [("wait_event", computing, mark)]
        stream.wait(None)
        assert len(said) == 2 and not card.calls["synchronize"]


def test_on_a_cpu_a_copy_is_done_when_it_returns() -> None:
    stream = CopyStream(CPU)
    with stream.copying():
        pass
    assert stream.mark() is None
    stream.wait(stream.mark())


def test_without_a_card_a_copy_is_done_when_it_returns() -> None:
    copies, to = CopyStream(CPU), torch.zeros(3)
    with copies.copying(copies.computed()):
        to.copy_(torch.ones(3), non_blocking=True)
    assert copies.mark() is None and copies.computed() is None
    copies.wait(copies.mark())
    assert to.tolist() == [1, 1, 1]


def test_on_a_card_copies_wait_for_what_was_computed_and_computing_for_the_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with rehearsal(monkeypatch, Card()) as card:
        copies = CopyStream(CPU)
        with copies.copying():
            assert card.current_stream() is not card.default_stream()
        assert card.current_stream() is card.default_stream()
        assert dict(card.calls) == {"Stream.wait_stream": 1}, "all that was computed until now"
        free = copies.computed()
        with copies.copying(free):
            pass
        assert card.calls["Stream.wait_stream"] == 1 and card.calls["Stream.wait_event"] == 1, "no more than that point"
        copies.wait(copies.mark())
        assert card.calls["Stream.wait_event"] == 2 and card.calls["Event.record"] == 2
        assert not card.calls["Event.synchronize"] and not card.calls["synchronize"], "the host waits for nothing"
