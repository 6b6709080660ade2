"""The card of an adapter says how its exam went, once, and the adapter beside it stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import run_folder
from qlora.events import Recorder
from qlora.stop import StopRequest
from qlora.study import exam, exam_report
from qlora.study.run_exam import RunExam
from tests.study.cases import passages, tiny_teacher


def test_the_card_gets_the_figures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exam, "after", lambda *_: {})
    monkeypatch.setattr(exam_report, "card_section", lambda _: "## Exam\n\ntuned 74 %")
    sink = Recorder()

    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text("# A card\n")

    run_folder.publish_adapter(tmp_path, write, sink)
    asked = exam.Exam(tmp_path / "study", passages(2), [], 7)
    one = RunExam(asked, tiny_teacher(sink=sink, stop=StopRequest()), ("chat", "chat"), "base")
    for _ in range(2):
        one.after(tmp_path)
    assert (tmp_path / "adapter" / "README.md").read_text() == "# A card\n\n## Exam\n\ntuned 74 %\n"
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == "{}"
    assert not [event for event in sink.of("notice") if "changed" in event.as_dict()["message"]]
