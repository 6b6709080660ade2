"""The screen in a notebook: one output that is drawn over, bounded whatever a run tells."""

from __future__ import annotations

import pytest

from qlora.events import End, Evaluated, Exported, Fidelity, Notice, Progress, Sampled, Sinks, Start, StepDone
from qlora.report import notebook
from qlora.report.notebook import MOST_OUTPUTS, OUTPUT_CHARACTERS, NotebookSink
from tests.notebooks import Page, open_notebook


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return open_notebook(monkeypatch)


def step(number: int) -> StepDone:
    return StepDone(number, number / 10, 2.0 / number, 1e-4, 0.5, 100, 50, 1000.0, 2**30, 0.1)


END = End("finished", 3, 3, 1.0, 300, 150, 0.5, 0.6, 0.0, 1.0, 2**30, "runs/tiny/adapter", 3)
ENTRY = {"name": "hf", "measured_by": "transformers", "kl": 1e-5, "perplexity": 2.0, "top1": 1.0, "bytes": 10}


def test_lines_stay_the_panel_moves_below_them_and_goes(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "SECONDS", 0.0)
    sink = NotebookSink()
    sink.emit(Start("tiny", "runs/tiny", "base", None, "cpu", {}, None))
    sink.emit(step(1))
    assert "gradient norm" in page.text and page.text.index("run folder") < page.text.index("gradient norm")
    sink.emit(Evaluated(1, 0.7, 2.0, None, 5, True))
    assert page.text.count("gradient norm") == 1
    assert page.text.index("evaluation at step 1") < page.text.index("gradient norm")
    sink.emit(END)
    assert "gradient norm" not in page.text and "finished at step 3" in page.text
    sink.emit(Progress("merge", 1, 4))
    assert "merge" in page.text and "gradient norm" not in page.text  # the run is over, its export is not
    sink.close()
    assert "merge" not in page.text
    assert page.text.count("evaluation at step 1") == page.text.count("finished at step 3") == len(page.outputs) == 1


def test_quick_steps_are_not_all_drawn(page: Page) -> None:
    sink = NotebookSink()
    for number in range(1, 1001):
        sink.emit(step(number))
    sink.close()
    assert 1 < page.updates < 100 and len(page.outputs) == 1 and page.text == ""


def test_of_very_many_lines_the_first_and_the_newest_are_kept(page: Page) -> None:
    sink = NotebookSink()
    for number in range(600):
        sink.emit(Notice("rows", f"line {number}, {'x' * 2400}"))
    sink.close()
    assert len(page.outputs) == MOST_OUTPUTS
    assert len(page.html) < MOST_OUTPUTS * (OUTPUT_CHARACTERS + 4_000)
    seen = [number for number in range(600) if f"line {number}," in page.text]
    assert seen[0] == 0 and seen[-1] == 599 and len(seen) == len(set(seen))
    assert f"… {600 - len(seen):,} lines are left out here" in page.text
    assert all(page.text.count(f"line {number},") <= 1 for number in range(600))


def test_strangers_text_is_text(page: Page) -> None:
    sink = Sinks(NotebookSink())
    sink.emit(Sampled(1, "<img src=x onerror=alert(1)>", "</pre><script>", "[red]x[/red]", "\x1b]0;title\x07"))
    sink.close()
    assert "<img" not in page.html and "<script" not in page.html and page.html.count("<pre") == 2
    assert "[red]x[/red]" in page.text and "\x1b" not in page.html


def test_what_the_cells_value_draws_is_not_drawn_twice(page: Page) -> None:
    told = Fidelity("evaluation rows", 4, 20, (ENTRY,))
    sink = NotebookSink(results=False)
    sink.emit(told)
    sink.emit(Exported("hf", "runs/tiny/export/hf", 10, "nf4", 1e-5))
    sink.close()
    assert "mean KL" not in page.text and "runs/tiny/export/hf" in page.text
    sink = NotebookSink()
    sink.emit(told)
    assert page.text.count("mean KL") == 1
