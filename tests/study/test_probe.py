"""The probe takes the better frame, keeps what it saw, and says what was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora.errors import ModelError
from qlora.study.generation import Written
from qlora.study.probe import Probed, probe, refuse_too_small, tell
from qlora.study.prompts import Frame
from tests.study.cases import Scripted, passages

KINDS = ("fact", "how")


class ReadsIn(Scripted):
    """Reads in one frame only."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    def greedy(self, frame: Frame, texts: Sequence[str], max_new_tokens: int) -> list[Written]:
        self.reads = frame == self.frame
        return super().greedy(frame, texts, max_new_tokens)


def probed_by(teacher: Scripted, folder: Path) -> Probed:
    return probe(teacher, passages(6), folder / "probe.json", KINDS, (1,))


@pytest.mark.parametrize("frame", ["chat", "lines"])
def test_the_better_frame_is_taken(tmp_path: Path, frame: Frame) -> None:
    found = probed_by(ReadsIn(frame), tmp_path)
    assert found.frame == frame and found.second == "sentence"
    assert (found.best.asked, found.best.parsed, found.best.right) == (20, 20, 20)
    other = next(reading for reading in found.readings if reading.frame != frame)
    assert other.right == 0 and all(trial.reason for trial in other.trials)
    refuse_too_small(found, "base")


def test_where_both_read_the_other_reads_again(tmp_path: Path) -> None:
    found = probed_by(Scripted(), tmp_path)
    assert (found.frame, found.second) == ("chat", "other frame")


def test_a_base_without_a_template_reads_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(Scripted().chat), "template", None)
    found = probed_by(Scripted(), tmp_path)
    assert found.frame == "lines" and len(found.readings) == 1


def test_it_is_read_again_and_made_again(tmp_path: Path) -> None:
    first = probed_by(Scripted(), tmp_path)
    again = Scripted()
    assert probed_by(again, tmp_path) == first and again.calls == 0
    for data in (b"", b"{}", b"[1]", (tmp_path / "probe.json").read_bytes()[:-20]):
        (tmp_path / "probe.json").write_bytes(data)
        assert probed_by(Scripted(), tmp_path) == first
    other = Scripted()
    probe(other, passages(6), tmp_path / "probe.json", KINDS, (2,))
    assert other.calls > 0


def test_what_went_wrong_is_told_with_examples(tmp_path: Path) -> None:
    teacher = Scripted(reads=False)
    found = probed_by(teacher, tmp_path)
    tell(teacher, found)
    messages = [event.as_dict()["message"] for event in teacher.recorder.of("notice")]
    assert any("0 of 20 answers right" in message for message in messages)
    assert sum("answered 'no idea'" in message for message in messages) == 3
    with pytest.raises(ModelError, match=r"0 of 20 answers \(0%\)"):
        refuse_too_small(found, "base")


def test_words_that_go_on_are_no_questions(tmp_path: Path) -> None:
    found = probed_by(Scripted(asks=False), tmp_path)
    assert found.best.parsed == 0
    with pytest.raises(ModelError, match="0 of 20 tries gave a question"):
        refuse_too_small(found, "base")
