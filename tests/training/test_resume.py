"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.errors import RunFolderError
from qlora.model import lora_functions
from qlora.report.files import read_events
from tests.runs import EVERYTHING, hashes, run_dir, train, values, write_recipe
from tests.sampling import sampled
from tests.training.cases import signed_anew

# Without dropout, which is peft's to compute: layers are computed by our own functions.
ALL = (*EVERYTHING, "lora.dropout=0", "train.max_steps=12")
OPTIMIZERS = ("paged_adamw_8bit", "paged_adamw_32bit", "adamw", "lion_8bit")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, str]:
    """Hashes after 12 uninterrupted steps with everything on."""
    recipe = write_recipe(tmp_path_factory.mktemp("straight"), llama)
    recorder = train(recipe, *ALL)
    assert values(recorder, "start", "numerics")[0]["functions"] == lora_functions.NORMED
    return hashes(recipe, 12)


@pytest.mark.parametrize("stop_after", [1, 5, 6, 11])
def test_stopped_and_resumed_equals_straight(
    tmp_path: Path, llama: Path, straight: dict[str, str], stop_after: int
) -> None:
    recipe = write_recipe(tmp_path, llama)
    first = train(recipe, *ALL, stop_after=stop_after)
    second = train(recipe, *ALL, mode="resume")
    assert values(first, "step", "step") == list(range(1, stop_after + 1))
    assert values(second, "step", "step") == list(range(stop_after + 1, 13))
    assert hashes(recipe, 12) == straight
    steps = [event["step"] for event in read_events(run_dir(recipe) / "events.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, 13))


def test_with_dropout(tmp_path: Path, llama: Path) -> None:
    """What is drawn in a layer is drawn as it would have been; peft computes it."""
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    recorder = train(one, *EVERYTHING, "train.max_steps=4")
    assert values(recorder, "start", "numerics")[0]["functions"] == lora_functions.PEFT
    train(two, *EVERYTHING, "train.max_steps=4", stop_after=2)
    train(two, *EVERYTHING, "train.max_steps=4", mode="resume")
    assert hashes(two, 4) == hashes(one, 4)


def test_a_run_of_a_version_without_functions_of_its_own_goes_on_with_pefts(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numerics do not say who computed its layers, and its `gradient_checkpointing` was true or false."""
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    settings = ("train.max_steps=4", "train.batch_size=2", "train.gradient_checkpointing=true")
    with monkeypatch.context() as patch:
        patch.setattr(lora_functions, "choose", lambda *_: lora_functions.PEFT)
        train(one, *settings)
        train(two, *settings, stop_after=2)
    state = run_dir(two) / "checkpoints" / "step-000002" / "state.json"
    content = json.loads(state.read_text())
    assert content["state"]["numerics"].pop("functions") == lora_functions.PEFT
    assert content["state"]["gradient_checkpointing"] is True
    signed_anew(state.parent, state_json=json.dumps(content).encode())
    again = train(two, *settings, mode="resume")
    assert values(again, "start", "numerics")[0]["functions"] == lora_functions.PEFT
    assert repr(values(again, "plan", "gradient_checkpointing")) == "[True]"
    assert hashes(two, 4) == hashes(one, 4)
    ours = write_recipe(tmp_path / "ours", llama)
    train(ours, *settings)
    assert hashes(ours, 4) != hashes(one, 4)


def test_evaluation_changes_nothing(tmp_path: Path, llama: Path, straight: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, llama)
    off = ("eval.every_steps=1000", "eval.samples=0", "eval.exact_match_rows=0")
    train(recipe, *ALL, *off)
    assert hashes(recipe, 12) == straight


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, llama: Path, straight: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *ALL, "train.gradient_checkpointing=true")
    assert hashes(recipe, 12) == straight


def test_with_every_default(tmp_path: Path, llama: Path) -> None:
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    train(one, "train.max_steps=4")
    train(two, "train.max_steps=4", stop_after=2)
    train(two, "train.max_steps=4", mode="resume")
    assert hashes(two, 4) == hashes(one, 4)


PACKED_AND_NOT = [*(("true", one) for one in OPTIMIZERS), ("false", OPTIMIZERS[0])]


@pytest.mark.parametrize(
    ("packing", "optimizer"),
    sampled(PACKED_AND_NOT, PACKED_AND_NOT[0], ("true", "lion_8bit"), PACKED_AND_NOT[-1]),
)
def test_every_optimizer_packed_and_not(tmp_path: Path, llama: Path, optimizer: str, packing: str) -> None:
    settings = (f"train.optimizer={optimizer}", f"data.packing={packing}", "train.max_steps=4", "train.batch_size=3")
    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    train(one, *settings)
    train(two, *settings, stop_after=2)
    train(two, *settings, mode="resume")
    assert hashes(two, 4) == hashes(one, 4)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, llama: Path, straight: dict[str, str]
) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = (*ALL, "checkpoint.every_steps=2")
    train(recipe, *settings, stop_after=6)
    newest = run_dir(recipe) / "checkpoints" / "step-000006" / "optimizer.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 4
    newest.write_bytes(raw)
    second = train(recipe, *settings, mode="resume")
    assert values(second, "step", "step")[0] == 5
    assert "damaged" in values(second, "notice", "message")[0]
    assert hashes(recipe, 12) == straight


def test_resuming_a_finished_run_ends_as_it_did(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *EVERYTHING, "train.max_steps=3")
    before = hashes(recipe, 3)
    again = train(recipe, *EVERYTHING, "train.max_steps=3", mode="resume")
    assert not again.of("step") and hashes(recipe, 3) == before
    assert values(again, "end", "reason") == ["finished"]


def test_other_recipes_and_other_rows_are_refused(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = ("train.max_steps=3", "train.batch_size=2")
    train(recipe, *settings, stop_after=1)
    with pytest.raises(RunFolderError, match=r"differ: train\.learning_rate"):
        train(recipe, *settings, "train.learning_rate=1e-3", mode="resume")
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(recipe, *settings)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("lamp 3", "lamp three"))
    with pytest.raises(RunFolderError, match="another data"):
        train(recipe, *settings, mode="resume")
    train(recipe, *settings, mode="fresh")
    assert (run_dir(recipe).with_name("tiny.1") / "recipe.toml").is_file()


def test_nothing_to_resume(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(RunFolderError, match="no run here"):
        train(write_recipe(tmp_path, llama), mode="resume")


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path, llama: Path, straight: dict[str, str]) -> None:
    """The same through the command, stopped by a real SIGTERM in its own process; this one goes on."""
    recipe = write_recipe(tmp_path, llama)
    code = (
        "import os, signal, sys\n"
        "from qlora.report import console\n"
        "class Kill(console.ConsoleSink):\n"
        "    def emit(self, event):\n"
        "        super().emit(event)\n"
        "        if event.kind == 'step' and event.step == 5:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "console.ConsoleSink = Kill\n"
        "from qlora.cli.train import app\n"
        "app()\n"
    )
    settings = [word for item in ALL for word in ("--set", item)]
    first = subprocess.run([sys.executable, "-c", code, str(recipe), *settings], capture_output=True, text=True)
    assert first.returncode == 143, first.stderr
    assert "saved after step 5 of 12" in first.stderr and "--resume" in first.stderr
    train(recipe, *ALL, mode="resume")
    assert hashes(recipe, 12) == straight
