"""What a run shows of itself in a notebook."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora.errors import RunFolderError
from qlora.events import Evaluated, StepDone
from qlora.report.results import history, loss_curve


@pytest.fixture
def told(tmp_path: Path) -> Path:
    events = [StepDone(n, n / 10, 4.0 / n, 1e-4, 0.5, 100, 50, 1000.0, 2**30, 0.1) for n in (1, 2, 3, 2)]
    lines = [json.dumps(event.as_dict()) for event in [*events, Evaluated(2, 0.7, 2.0, None, 5, True)]]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, "<script>", ""]))
    return tmp_path


def test_each_step_once_as_columns(told: Path) -> None:
    found = history(told)
    assert found["step"] == [1, 2, 3] and found["loss"] == [4.0, 2.0, 4.0 / 3]
    assert {len(column) for column in found.values()} == {3} and "grad_norm" in found


def test_the_curve_is_well_formed_and_has_both_losses(told: Path) -> None:
    open_tags: list[str] = []
    seen: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            open_tags.append(tag)
            seen.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    html = loss_curve(told)
    Parser().feed(html)
    assert not open_tags and "svg" in seen and "script" not in seen
    assert ">training<" in html and ">evaluation<" in html


def test_a_run_without_events_shows_no_curve(tmp_path: Path) -> None:
    assert loss_curve(tmp_path) == ""
    with pytest.raises(RunFolderError, match="holds no events"):
        history(tmp_path)
