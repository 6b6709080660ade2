"""What a run does with its documents around the study: a stop, a full disk, records of a run before."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from qlora.data.row_json import RowError
from qlora.errors import DataError, RecipeError, RunFolderError, StoppedBySignal, TrainingStopped
from qlora.events import Recorder
from qlora.recipe.reading import Recipe
from qlora.stop import StopRequest
from qlora.study import exam_questions, material
from tests.study.cases import passages


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


def studied_run(folder: Path, trains: bool = True) -> tuple[Path, Recipe]:
    """A folder of two documents, and a run that has studied them."""
    (folder / "manuals").mkdir()
    for name, words in (("a", "The lamp costs 7 crowns."), ("b", "The pump weighs 3 kg.")):
        (folder / "manuals" / f"{name}.md").write_text(f"# {name}\n\n{words}\n")
    keys = {"model": {"base": "a/b"}, "data": {"documents": [{"path": str(folder / "manuals")}]}}
    recipe = Recipe.model_validate(keys)
    _, found = material.read(recipe, True, Recorder())
    assert found is not None
    run_dir = folder / "run"
    (run_dir / "study").mkdir(parents=True)
    exam_questions.save_passages(run_dir / "study", passages(2))
    (run_dir / "study" / "documents.json").write_text(json.dumps(dict(found.hashes)))
    if trains:
        (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    return run_dir, recipe


@pytest.mark.parametrize("gone", ["a.md", ""])
def test_a_run_that_trains_goes_on_without_documents_that_are_gone(tmp_path: Path, gone: str) -> None:
    run_dir, recipe = studied_run(tmp_path)
    place = tmp_path / "manuals" / gone
    place.unlink() if gone else shutil.rmtree(place)
    sink = Recorder()
    _, found = material.read(recipe, True, sink, run_dir)
    assert (
        found is not None
        and found.passages == tuple(passages(2))
        and set(found.hashes) == {"manuals/a.md", "manuals/b.md"}
    )
    (said,) = [event.as_dict() for event in sink.of("notice") if "gone since" in event.as_dict()["message"]]
    assert said["count"] == (1 if gone else 2)


def test_documents_that_changed_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_dir, recipe = studied_run(tmp_path)
    (tmp_path / "manuals" / "b.md").write_text("# b\n\nThe pump weighs 4 kg.\n")
    with pytest.raises(RunFolderError, match=r"have changed since they were studied: manuals/b\.md") as found:
        material.read(recipe, True, Recorder(), run_dir)
    assert "mode='fresh'" in found.value.hint
    (run_dir / "study" / "documents.json").write_text("[broken")
    with pytest.raises(RunFolderError, match=r"documents\.json"):
        material.read(recipe, True, Recorder(), run_dir)


def test_before_it_trains_a_study_learns_what_there_is(tmp_path: Path) -> None:
    run_dir, recipe = studied_run(tmp_path, trains=False)
    (tmp_path / "manuals" / "b.md").write_text("# b\n\nThe pump weighs 4 kg.\n")
    (tmp_path / "manuals" / "a.md").unlink()
    _, found = material.read(recipe, True, Recorder(), run_dir)
    assert found is not None and found.passages is None and list(found.hashes) == ["manuals/b.md"]
    shutil.rmtree(run_dir / "study")
    shutil.rmtree(tmp_path / "manuals")
    with pytest.raises(DataError):  # nothing of it was studied to the end
        material.read(recipe, True, Recorder(), run_dir)


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        ({"eval": {"exact_match_rows": 3}}, "eval.exact_match_rows"),
        ({"eval": {"samples": 5, "every_steps": 10}}, "eval.every_steps, eval.samples"),
        ({"data": {"eval_fraction": 0.1}}, "data.eval_fraction"),
    ],
)
def test_evaluation_without_rows_for_it_is_refused(tables: dict[str, dict[str, float]], named: str) -> None:
    data = {"documents": [{"path": "m"}], **tables.get("data", {})}
    with pytest.raises(RecipeError) as found:
        material.read(Recipe.model_validate({"model": {"base": "a/b"}, **tables, "data": data}), True, Recorder())
    (problem,) = found.value.problems
    assert named in problem.what and "[[data.eval]]" in problem.hint
