"""Checkpoints: which are kept, what they say of themselves, and what is put back of them."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from qlora import disk
from qlora.errors import RunFolderError
from qlora.events import Recorder
from qlora.model.identity import Fingerprints
from qlora.training import checkpoint
from qlora.training.checkpoint import RunState
from qlora.training.memory_plan import MemorySettings
from tests.runs import run_dir, train, values, write_recipe
from tests.training.cases import ABOUT, FILES, optimizer, signed_anew


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.snapshot(folder, RunState(step=2), optimizer(), Fingerprints("b", "d"), 2, ABOUT)()
    return folder


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, "train.max_steps=5", "train.batch_size=2", "checkpoint.every_steps=1", "checkpoint.keep=2")
    names = sorted(path.name for path in (run_dir(recipe) / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


def test_the_manifest_tells_how_it_was_made(run: Path) -> None:
    manifest = disk.read_manifest(checkpoint.folder_of(run, 2))
    assert manifest["versions"] == ABOUT["versions"] and manifest["recipe_sha256"] == "ab" * 32
    assert set(manifest["files"]) == set(FILES)


def test_tensors_are_restored_bit_for_bit_or_not_at_all(run: Path) -> None:
    made = checkpoint.Checkpoint(checkpoint.folder_of(run, 2), RunState(step=2))
    first, second = optimizer(), optimizer()
    for master in second.masters.values():
        master.data.zero_()
    checkpoint.restore(made, second, Fingerprints("b", "d"))
    one, other = first.state(), second.state()
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    for wrong in (Fingerprints("x", "d"), Fingerprints("b", "x")):
        with pytest.raises(RunFolderError, match="was made with another"):
            checkpoint.restore(made, second, wrong)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("state", {"step": "2"}, "state: step is wrong: Input should be a valid integer"),
        ("state", {"step": True}, "state: step is wrong"),
        ("state", {"step": -1}, "state: step is wrong: Input should be greater than or equal to 0"),
        ("state", {"seconds": "1e9"}, "state: seconds is wrong"),
        ("state", {"micro_batch_size": 0}, "state: micro_batch_size is wrong"),
        ("state", [], "state is wrong"),
        ("counters", {"a": -1}, "counters.a is wrong"),
        ("fingerprints", "x", "fingerprints is wrong"),
        ("fingerprints", {"base": "b"}, "fingerprints: data is wrong: Field required"),
        ("fingerprints", {"base": "b", "data": "d", "base_identity": {"config": 1}}, "base_identity.config is wrong"),
        ("format", "2", "format is wrong"),
    ],
)
def test_a_state_that_is_none_is_set_aside(run: Path, tmp_path: Path, key: str, value: Any, reason: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = checkpoint.folder_of(folder, 2)
    content = json.loads((newest / "state.json").read_text())
    signed_anew(newest, state_json=json.dumps(content | {key: value}).encode())
    sink = Recorder()
    assert checkpoint.newest(folder, sink) is None
    (said,) = values(sink, "notice", "message")
    assert "step-000002 is damaged" in said and "state.json" in said and reason in said and ".broken1" in said


@pytest.mark.parametrize("setting", [True, False, None, 1, 3])
def test_how_many_layers_are_recomputed_is_read_as_it_was_written(run: Path, tmp_path: Path, setting: Any) -> None:
    """Older versions knew all or none: true is no number 1, and a number no true."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = checkpoint.folder_of(folder, 2)
    content = json.loads((newest / "state.json").read_text())
    state = content["state"] | {"gradient_checkpointing": setting, "micro_batch_size": 2}
    signed_anew(newest, state_json=json.dumps(content | {"state": state}).encode())
    made = checkpoint.newest(folder, Recorder())
    assert made is not None and repr(made.state.gradient_checkpointing) == repr(setting)
    settings = MemorySettings(4, 7).as_of(made.state)
    assert repr(settings.gradient_checkpointing) == repr(7 if setting is None else setting)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"1" * 10_000, b"", b"\xff", b'{"format": 2}'])
def test_a_state_that_is_no_json_is_set_aside(run: Path, tmp_path: Path, text: bytes) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    signed_anew(checkpoint.folder_of(folder, 2), state_json=text)
    assert checkpoint.newest(folder, Recorder()) is None


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> bytes:
    data: bytes = save(change(load_file(file)))
    return data


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("adapter", lambda t: {f"{key}x": value for key, value in t.items()}, "types of its adapter are others"),
        ("adapter", lambda t: {key: value[:1] for key, value in t.items()}, "types of its adapter are others"),
        (
            "adapter",
            lambda t: {key: value.float() for key, value in t.items()},
            "types of its adapter are others",
        ),
        ("adapter", lambda t: {key: value * float("nan") for key, value in t.items()}, "not finite"),
        ("optimizer", lambda t: {key: value * float("inf") for key, value in t.items()}, "not finite"),
        ("optimizer", lambda t: {**t, "exp_avg/strange": torch.ones(2)}, "'strange', which is not trained"),
        ("optimizer", lambda t: {key: value for key, value in t.items() if "master" not in key}, "master/"),
    ],
)
def test_tensors_of_another_kind_are_refused(run: Path, tmp_path: Path, name: str, change: Any, reason: str) -> None:
    folder = checkpoint.folder_of(Path(shutil.copytree(run, tmp_path / "run")), 2)
    data = changed(folder / f"{name}.safetensors", change)
    signed_anew(folder, **{f"{name}_safetensors": data})
    made = checkpoint.newest(tmp_path / "run", Recorder())
    assert made is not None
    with pytest.raises(RunFolderError, match="does not fit this model") as error:
        checkpoint.restore(made, optimizer(), Fingerprints("b", "d"))
    assert reason in error.value.what


def test_only_our_own_names_are_checkpoints(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("step-²", "step-" + "9" * 200, "step-x", "step-"):
        (folder / "checkpoints" / name).mkdir()
    found = checkpoint.newest(folder, Recorder())
    assert found is not None and found.state.step == 2


def test_checkpoint_newest_needs_no_run(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, Recorder()) is None


def test_what_is_written_is_the_state_of_its_moment(tmp_path: Path) -> None:
    """Steps go on while a thread writes: no byte of it is of a later one."""
    made = optimizer()
    before = {name: tensor.clone() for name, tensor in made.state()[0].items()}
    adapter = {key: parameter.detach().clone() for key, parameter in made.parameters.items()}
    publish = checkpoint.snapshot(tmp_path, RunState(step=1), made, Fingerprints("b", "d"), 2, ABOUT)
    for key, master in made.masters.items():
        made.add_gradient(key, torch.ones_like(master))
    made.step(1e-1)
    publish()
    folder = checkpoint.folder_of(tmp_path, 1)
    for name, wanted in (("adapter", adapter), ("optimizer", before)):
        assert (folder / f"{name}.safetensors").read_bytes() == save(wanted), name
        now = made.parameters if name == "adapter" else made.state()[0]
        assert not all(torch.equal(now[key], tensor) for key, tensor in wanted.items())


def test_memory_that_runs_out_waits_for_the_copy_that_is_written(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are done again when its memory is free."""
    from qlora.training import loop

    recipe, seen, real = write_recipe(tmp_path, llama), list[object](), loop.Training._apply

    def apply(self: loop.Training, now: Any) -> None:
        real(self, now)
        seen.append(self.checkpointer.saving._writing)

    started, passes, forward = threading.Event(), iter(range(99)), loop.forward_backward
    publish = disk.publish_folder

    def slow(final: Path, *arguments: Any) -> Any:
        started.set()
        time.sleep(0.2 if final.name == "step-000001" else 0)
        return publish(final, *arguments)

    def forward_backward(*arguments: Any) -> Any:
        if next(passes) == 2:  # of step 2
            assert started.wait(30)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*arguments)

    monkeypatch.setattr(loop.Training, "_apply", apply)
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)
    monkeypatch.setattr(disk, "publish_folder", slow)
    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    keys = ("train.max_steps=2", "train.batch_size=4", "train.micro_batch_size=2", "data.eval_fraction=0")
    recorder = train(recipe, *keys, "data.packing=false", "checkpoint.every_steps=1")
    assert values(recorder, "recovered", "step") == [2] and seen == [None, None]
    kinds = [event.kind for event in recorder.events if event.kind in ("saved", "recovered")]
    assert kinds[:2] == ["recovered", "saved"]  # the thread was still at it
