"""A project that is moved, renamed or copied goes on where it is now; a run whose folder goes away ends in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import api, disk
from qlora.errors import TrainingStopped
from qlora.events import Event, Recorder, Sinks
from qlora.recipe.reading import load_recipe
from tests.runs import hashes, run_dir, train, values, write_recipe

SETTINGS = (
    "train.max_steps=4",
    "train.batch_size=2",
    "data.max_length=96",
    "eval.samples=0",
    "checkpoint.every_steps=2",
)


def project(place: Path, base: Path) -> Path:
    """A project with base, rows, recipe and a run that stopped after two of four steps."""
    shutil.copytree(base, place / "base")
    recipe = write_recipe(place, place / "base")
    text = recipe.read_text().replace(f'"{place / "base"}"', '"./base"').replace(f'"{place / "runs"}"', '"runs"')
    recipe.write_text(text)
    return recipe


@pytest.mark.parametrize("how", ["moved", pytest.param("copied", marks=pytest.mark.slow)])
def test_a_project_in_another_place_resumes_and_exports(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Paths are no identity: base and rows lie in the same places seen from the run."""
    old = tmp_path / "old"
    recipe = project(old, llama)
    monkeypatch.chdir(old)
    train(recipe, *SETTINGS, stop_after=2)
    straight = Path(shutil.copytree(old, tmp_path / "straight")) / recipe.name
    new = tmp_path / "deeper" / "new"
    shutil.copytree(old, new) if how == "copied" else (new.parent.mkdir(), old.rename(new))
    there = new / recipe.name
    monkeypatch.chdir(new)
    resumed = train(there, *SETTINGS, mode="resume")
    assert values(resumed, "step", "step") == [3, 4]
    monkeypatch.chdir(straight.parent)
    train(straight, *SETTINGS, mode="resume")
    assert hashes(there, 4) == hashes(straight, 4)
    last = tmp_path / "last"
    new.rename(last)
    sink = Recorder()
    report = api.merge_and_export(last / "runs" / "tiny", options=api.export_options(verify=False), sink=sink)
    assert report.folder == last / "runs" / "tiny" / "export" / "hf" and disk.verify_folder(report.folder) is None
    assert values(sink, "notice", "topic").count("moved") == 1


class Once:
    """A sink that does something when a step is done, once."""

    def __init__(self, step: int, work: Callable[[], object]) -> None:
        self.step, self.work = step, work

    def emit(self, event: Event) -> None:
        if event.kind == "step" and event.as_dict()["step"] == self.step:
            self.work()

    def close(self) -> None:
        pass


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    (folder / "photo.jpg").write_text("mine")


LOSSES: dict[str, Callable[[Path], Any]] = {
    "deleted": shutil.rmtree,
    "with all above it": lambda folder: shutil.rmtree(folder.parent),
    "renamed": lambda folder: folder.rename(folder.with_name("moved")),
    "replaced": replaced,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_whose_folder_goes_away_stops_and_makes_nothing_anew(tmp_path: Path, llama: Path, loss: str) -> None:
    recipe = write_recipe(tmp_path, llama)
    folder = run_dir(recipe)
    left: list[Path] = []

    def lose() -> None:
        LOSSES[loss](folder)
        left.extend(sorted(path for path in tmp_path.rglob("*") if "moved" not in path.parts))

    settings = [*SETTINGS, "checkpoint.every_steps=1", "eval.every_steps=1"]
    with pytest.raises(TrainingStopped, match="moved, removed or replaced") as caught:
        api.train(load_recipe(recipe, settings), name="tiny", sink=Sinks(Once(2, lose)))
    assert caught.value.exit_code == 4
    assert sorted(path for path in tmp_path.rglob("*") if "moved" not in path.parts) == left
    if (moved := folder.with_name("moved")).is_dir():
        moved_steps = sorted(path.name for path in (moved / "checkpoints").iterdir())
        assert moved_steps == ["step-000001"] and disk.verify_folder(moved / "checkpoints" / "step-000001") is None
