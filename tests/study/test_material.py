"""What a run does with its documents around the study: a stop, a full disk, records of a run before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from qlora.data.row_json import RowError
from qlora.errors import DataError, StoppedBySignal, TrainingStopped
from qlora.events import Recorder
from qlora.recipe.reading import Recipe
from qlora.stop import StopRequest
from qlora.study import material


def test_a_stop_and_a_full_disk_say_what_is_kept(tmp_path: Path) -> None:
    stop = StopRequest()
    with pytest.raises(TrainingStopped, match="disk is full") as full, material.keeping(stop, tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "resume" in full.value.hint
    with pytest.raises(PermissionError), material.keeping(stop, tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(DataError, match="cannot be rendered: it broke"), material.keeping(stop, tmp_path):
        raise RowError("it broke")
    stop.set()
    with pytest.raises(StoppedBySignal), material.keeping(stop, tmp_path):
        raise RowError("the process that renders was ended by the same signal")
    with pytest.raises(StoppedBySignal, match="is kept in") as stopped, material.keeping(stop, tmp_path):
        stop.check()
    assert "resume" in stopped.value.hint and not stop.is_read


def test_records_of_a_run_before_are_taken_over_and_nothing_else(tmp_path: Path) -> None:
    before, now, sink = tmp_path / "run.1", tmp_path / "run", Recorder()
    material.take_over(before, now, sink)
    assert not sink.events and not now.exists()
    (before / "study").mkdir(parents=True)
    (before / "study" / "answers.jsonl").write_text("{}\n")
    (before / "study" / "exam.json").write_text("{}")
    (tmp_path / "elsewhere").write_text("not ours")
    (before / "study" / "labels.bin").symlink_to(tmp_path / "elsewhere")
    material.take_over(before, now, sink)
    assert [path.name for path in (now / "study").iterdir() if not path.name.startswith(".")] == ["answers.jsonl"]
    assert len(sink.of("notice")) == 1


def test_text_alone_is_told_what_it_teaches() -> None:
    sink = Recorder()
    sources = {"train": [{"path": "manuals", "format": "documents"}]}
    recipe = Recipe.model_validate({"model": {"base": "a/b"}, "data": sources})
    assert material.read(recipe, True, sink) == (recipe, None)
    (said,) = sink.of("notice")
    assert "[[data.documents]]" in said.as_dict()["message"]
