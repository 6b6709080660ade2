"""In which order copies and computing wait for each other; on a CPU nobody waits."""

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
