"""A run goes on, and is exported, with the base that it began with: known by its weights, wherever they lie."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import api
from qlora.disk import read_manifest
from qlora.errors import ExportError, ModelError, RunFolderError, UserError
from qlora.events import Recorder
from qlora.recipe.reading import load_recipe
from tests.families import make_base, split_into_shards
from tests.runs import change_unsampled_value, run_dir, train, values, write_recipe

SETTINGS = (
    *("train.max_steps=3", "train.batch_size=2", "train.micro_batch_size=1", "data.max_length=48", "lora.r=4"),
    *("data.eval_fraction=0.1", "eval.every_steps=1", "eval.samples=0", 'lora.target_modules=["q_proj", "v_proj"]'),
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: a base, a recipe, and a run that was stopped after its second step, with an adapter."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = write_recipe(folder, make_base("llama", folder / "base"))
    train(recipe, *SETTINGS, stop_after=2)
    return folder


@pytest.fixture
def project(begun: Path) -> Iterator[Path]:
    """A copy of it that a test may change; the first one is out of the way, so that no path leads there."""
    hidden = begun.with_name("hidden")
    begun.rename(hidden)
    shutil.copytree(hidden, begun)
    yield begun / "tiny.toml"
    shutil.rmtree(begun)
    hidden.rename(begun)


def resave(base: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(base / "model.safetensors")
    changed = {name: change(name, tensor) for name, tensor in tensors.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    return base


def another_fine_tune(base: Path) -> None:
    resave(base, lambda name, tensor: tensor + 0.01)


def a_converted_copy(base: Path) -> None:
    resave(base, lambda name, tensor: tensor.float())


def another_configuration(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def refused(work: Callable[..., Any], kind: type[UserError]) -> tuple[str, list[str]]:
    """What the error says, and what was under way by then."""
    sink = Recorder()
    with pytest.raises(kind) as error:
        work(sink)
    return error.value.what, [event.as_dict()["task"] for event in sink.of("progress")]


def resumed(recipe: Path, sink: Recorder) -> None:
    api.train(load_recipe(recipe, SETTINGS), name=recipe.stem, mode="resume", sink=sink)


def exported(recipe: Path, sink: Recorder, to: str = "hf", verify: bool = False) -> Any:
    return api.merge_and_export(run_dir(recipe), to=to, options=api.export_options(verify=verify), sink=sink)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (another_fine_tune, "its weights differ: this is another fine-tune of the same shape"),
        (a_converted_copy, "the same names and shapes in F32 instead of BF16: a converted copy is another base"),
        (another_configuration, "its config.json differs"),
    ],
)
def test_another_base_of_the_same_shape_is_refused_before_it_is_loaded(
    project: Path, change: Callable[[Path], None], what: str
) -> None:
    change(project.parent / "base")
    said, tasks = refused(lambda sink: resumed(project, sink), RunFolderError)
    assert f"step-000002: was made with another base: {what}" in said and not tasks
    said, tasks = refused(lambda sink: exported(project, sink), ExportError)
    assert "was trained on another base" in said and what in said and not tasks


def test_one_value_that_the_sample_misses_is_found_before_a_step_and_before_an_export(project: Path) -> None:
    change_unsampled_value(project.parent / "base")
    sink = Recorder()
    with pytest.raises(RunFolderError, match="another fine-tune of the same shape"):
        resumed(project, sink)
    assert not sink.of("step") and "load" in values(sink, "progress", "task")
    for to, verify, last in (("hf", False, "merge"), ("adapter-gguf", False, "check base"), ("hf", True, "load")):
        said, tasks = refused(lambda sink, *how: exported(project, sink, to, verify), ExportError)  # noqa: B023
        assert "another fine-tune of the same shape" in said and tasks[-1] == last
    assert not list((run_dir(project) / "export").glob("*"))


def test_what_an_export_reads_is_read_through_though_the_model_is_from_the_cache(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, sizes and times are those of the kept base, and one value of the original is another: the run goes on
    as it was, with the bytes that it was trained on, and nothing is made of the others."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    base = project.parent / "base"
    weights, past = base / "model.safetensors", time.time() - 60
    os.utime(weights, (past, past))
    cached = (*SETTINGS, "memory.cache=true")
    api.train(load_recipe(project, cached), name="other", mode="new", sink=Recorder())
    change_unsampled_value(base)
    os.utime(weights, (past, past))
    sink = Recorder()
    api.train(load_recipe(project, cached), name=project.stem, mode="resume", sink=sink)
    assert any("read from the cache" in one for one in values(sink, "notice", "message"))
    for to in ("hf", "adapter-gguf"):
        said, tasks = refused(lambda sink, to=to: exported(project, sink, to, verify=True), ExportError)  # type: ignore[misc]
        assert "another fine-tune of the same shape" in said and "check base" in tasks
    assert not list((run_dir(project) / "export").glob("*"))


def test_shards_change_nothing(project: Path) -> None:
    split_into_shards(project.parent / "base", 3)
    recorder = train(project, *SETTINGS, mode="resume")
    assert values(recorder, "step", "step") == [3]
    assert "base" not in values(recorder, "notice", "topic")
    exported(project, Recorder())


def test_a_base_under_another_name_is_the_same(project: Path) -> None:
    base = project.parent / "base"
    base.rename(project.parent / "renamed")
    project.write_text(project.read_text().replace(str(base), str(project.parent / "renamed")))
    assert values(train(project, *SETTINGS, mode="resume"), "step", "step") == [3]


def test_a_project_that_was_moved_as_a_whole_goes_on_and_is_exported(project: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / "project"
    shutil.copytree(project.parent, there)
    kept = project.parent.with_name("gone")
    project.parent.rename(kept)
    try:
        moved = there / "tiny.toml"
        moved.write_text(moved.read_text().replace(str(project.parent), str(there)))
        report = exported(moved, Recorder())
        assert report.folder.is_relative_to(there)
        recorder = train(moved, *SETTINGS, mode="resume")
        assert values(recorder, "step", "step") == [3]
    finally:
        kept.rename(project.parent)


def test_what_is_kept(project: Path) -> None:
    known = json.loads((run_dir(project) / "adapter" / "qlora.json").read_text())["identity"]
    (step,) = (run_dir(project) / "checkpoints").iterdir()
    saved = json.loads((step / "state.json").read_text())["fingerprints"]
    assert saved["base_identity"] == known and len(known["content"]) == 64 and saved["data_content"]
    for to in ("hf", "adapter-gguf"):
        report = exported(project, Recorder(), to)
        assert json.loads((report.folder / "export.json").read_text())["base_identity"] == known
        assert read_manifest(report.folder)["files"]


def test_an_adapter_of_an_older_version_says_what_was_not_compared(project: Path) -> None:
    file = run_dir(project) / "adapter" / "qlora.json"
    known = json.loads(file.read_text())
    del known["identity"]
    file.write_text(json.dumps(known))
    (run_dir(project) / "adapter" / "manifest.json").unlink()
    sink = Recorder()
    exported(project, sink)
    (said,) = [event.as_dict()["message"] for event in sink.of("notice") if event.as_dict()["topic"] == "base"]
    assert "made by an older version" in said and "no hash of the base's content" in said


def test_weights_that_are_not_finite_end_a_run_before_its_first_step(tmp_path: Path) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor.index_fill(0, torch.tensor([2]), float("nan")) if name.endswith("1.mlp.up_proj.weight") else tensor
        )

    recipe = write_recipe(tmp_path, resave(make_base("llama", tmp_path / "base"), spoil))
    sink = Recorder()
    with pytest.raises(ModelError, match="not finite") as error:
        api.train(load_recipe(recipe, SETTINGS), name="tiny", sink=sink)
    assert "model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight'" in error.value.what
    assert not sink.of("step") and error.value.exit_code == 2
