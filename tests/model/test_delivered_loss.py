"""What an adapter says of its loss is read as a stranger's word; of older runs, their events are asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ExportError
from qlora.model.delivered_loss import DeliveredLoss, of_older_run, read

RECORD = {
    "step": 4,
    "loss": 1.5,
    "sample_loss": 1.25,
    "sample_rows": 9,
    "sample_tokens": 81,
    "every": 3,
    "packs_at_once": 2,
    "packing": True,
    "content": "ab" * 32,
}


def write(folder: Path, **content: Any) -> Path:
    (folder / "qlora.json").write_text(json.dumps({"base": "b", **content}))
    return folder


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == (None, False), "made elsewhere"
    assert read(write(tmp_path)) == (None, True), "by an older version"
    assert read(write(tmp_path, evaluation=None)) == (None, False), "there were no evaluation rows"
    assert read(write(tmp_path, evaluation=RECORD)) == (DeliveredLoss(**RECORD), False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("every", 0), ("packs_at_once", 2**60), ("sample_rows", -1), ("loss", "low"), ("packing", 1), ("step", None)],
)
def test_what_no_version_wrote_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ExportError, match=rf"qlora.json: evaluation: {key} is wrong"):
        read(write(tmp_path, evaluation={**RECORD, key: value}))


@pytest.mark.parametrize("value", [7, [], "x", {}])
def test_another_kind_of_value_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ExportError, match="evaluation"):
        read(write(tmp_path, evaluation=value))


def event(step: int = 4, loss: Any = 1.5, rows: int = 3) -> dict[str, Any]:
    return {"event": "eval", "step": step, "loss": loss, "rows": rows}


def test_an_older_run_is_asked_for_the_loss_of_the_step() -> None:
    found = of_older_run(
        [{"event": "step", "step": 4, "loss": 9.0}, event(2, 3.0), event(), "foreign"], 4, [5, 6, 7], True
    )
    assert found is not None and (found.sample_loss, found.sample_rows, found.sample_tokens) == (1.5, 3, 18)
    assert (found.every, found.packs_at_once, found.content) == (1, 1, None)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [event(3)],
        [event(rows=4)],
        [event(), event(loss=1.6)],
        [event(loss=math.nan)],
        [event(loss=None)],
        [7, None],
    ],
)
def test_what_is_not_said_or_said_twice_is_not_compared(events: list[Any]) -> None:
    assert of_older_run(events, 4, [5, 6, 7], True) is None
    assert of_older_run([event(rows=0)], 4, [], True) is None
