"""Events: one kind each, plain values, and no secret behind the sinks."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qlora import events
from qlora.events import End, Event, Fidelity, Notice, Progress, Recorder, Rejected, Sampled, Sinks, clean

TOKEN = "hf_ThisIsTheHubTokenOfATest0123"


class Closing(Recorder):
    """Says where it was closed."""

    def __init__(self, order: list[str], name: str) -> None:
        super().__init__()
        self.order, self.name = order, name

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.order.append(f"{self.name} {event.kind}")

    def close(self) -> None:
        self.order.append(f"{self.name} closed")


def test_each_event_has_a_kind_of_its_own_and_cannot_be_changed() -> None:
    kinds = {kind.kind: kind for kind in Event.__subclasses__() if kind.__module__ == events.__name__}
    assert "" not in kinds and len(kinds) == len([k for k in Event.__subclasses__() if k.__module__ == events.__name__])
    with pytest.raises(dataclasses.FrozenInstanceError):
        Notice("a", "b").message = "c"  # type: ignore[misc]


def test_an_event_is_a_line_of_json_with_its_kind_first() -> None:
    end = End("finished", 3, 3, 1.5, 10, 5, 0.5, None, None, None, 0, None, None)
    line = json.dumps(end.as_dict())
    assert line.startswith('{"event": "end", "reason": "finished"')
    assert set(json.loads(line)) == {"event", *(field.name for field in dataclasses.fields(End))}


def test_secrets_are_hidden_wherever_they_stand_in_an_event() -> None:
    event = clean(Rejected("a.jsonl", f"holds {TOKEN}", 1, (f"a.jsonl:1 {TOKEN}",)))
    assert TOKEN not in repr(event) and event.as_dict()["count"] == 1
    nested = clean(Fidelity("rows", 1, 1, ({"name": f"gguf {TOKEN}", "kl": 0.1},)))
    assert TOKEN not in repr(nested) and nested.as_dict()["entries"][0]["kl"] == 0.1
    harmless = Notice("packing", "on")
    assert clean(harmless) is harmless


def test_every_sink_gets_every_event_in_order() -> None:
    order: list[str] = []
    one, two = Closing(order, "one"), Closing(order, "two")
    sinks = Sinks(one, two)
    sinks.emit(Notice("hub", f"refused {TOKEN}"))
    sinks.emit(Progress("load", 1, 2))
    sinks.close()
    assert order == [
        *("one notice", "two notice", "one progress", "two progress"),
        *("one closed", "two closed"),
    ]
    assert one.events == two.events and TOKEN not in repr(one.events)
    assert one.of("progress") == [Progress("load", 1, 2)] and one.of("end") == []


def test_texts_steer_no_terminal_and_only_samples_have_lines() -> None:
    event = clean(Rejected("a\x1b[2J\n.jsonl", "\udcff", 1, ("b\u202e:1", "\x9b")))
    assert event == Rejected("a␛[2J␊.jsonl", "\\xff", 1, ("b\\u202e:1", "\\x9b"))
    entry = {"name\x07": "\x1b", "bytes": 1}
    assert clean(Fidelity("rows", 1, 1, (entry,))) == Fidelity("rows", 1, 1, ({"name␇": "␛", "bytes": 1},))
    sample = Sampled(1, "two\nlines\tand\x1b[0m", "a", "b\r", "c")
    assert clean(sample) == Sampled(1, "two\nlines\tand␛[0m", "a", "b␍", "c")
