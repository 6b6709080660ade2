"""A run, its tokens and an export that version 5990ea1 left half-way go on with this version, to the same bits.

tools/make_old_run.py made the archive with that version's code, once; it tells how.
"""

from __future__ import annotations

import json
import re
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest

import qlora
from qlora import api
from qlora.data import prepare
from qlora.disk import sha256_file, verify_folder
from qlora.events import Recorder
from qlora.export.verify import weights
from tests.recipe.cases import other_defaults
from tests.runs import arithmetic, hashes, train, values

ARCHIVE = Path(__file__).parent / "golden" / "runs_5990ea1.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The archive unpacked into the current folder, with its hub and token caches in use; what was recorded."""
    from huggingface_hub import constants

    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*"):
        if path.name in ("events.jsonl", ".lock", "lock"):
            text = path.read_text().replace("@PLACE@", str(tmp_path)).replace("@HOST@", socket.gethostname())
            path.write_text(text)
    recorded: dict[str, Any] = json.loads((tmp_path / "recorded.json").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # Other libraries may tokenize otherwise: then tokens are made anew. Here the question is whether our code asks so.
    monkeypatch.setattr(prepare, "version", recorded["libraries"].__getitem__)
    (snapshot,) = (tmp_path / "hub" / "models--tests--tiny" / "snapshots").iterdir()
    return {**recorded, "same_arithmetic": arithmetic(snapshot) == recorded["arithmetic"]}


def test_a_run_goes_on_and_its_tokens_are_made_anew(old: dict[str, Any]) -> None:
    recorder = train(Path("tiny.toml"), mode="resume")
    losses, done = values(recorder, "step", "loss"), old["stopped_after"]
    assert values(recorder, "step", "step") == list(range(done + 1, len(old["losses"]) + 1))
    assert "tokenize" in values(recorder, "progress", "task")  # its tokens were made by older code
    assert any("step-" in text and "kept no hash of the base" in text for text in values(recorder, "notice", "message"))
    newest = max(Path("runs/tiny/checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["fingerprints"]["base_identity"]["content"]
    if old["same_arithmetic"]:
        assert losses == old["losses"][done:]
        assert hashes(Path("tiny.toml"), len(old["losses"])) == old["checkpoint"]
    else:
        assert losses == pytest.approx(old["losses"][done:], rel=1e-2)


NEW_DEFAULTS = {"train.learning_rate": 1e-5, "lora.r": 64, "data.eval_fraction": 0.4, "data.packing": False}


def test_a_default_that_has_changed_changes_no_run(old: dict[str, Any]) -> None:
    """Of keys that the user's recipe does not set any more, and of one that it never did; and a key of a later version
    in what the run recorded.
    """
    set_by_the_user = re.compile(r"(?m)^(learning_rate|r|eval_fraction) = .*\n")
    recipe, recorded = Path("tiny.toml"), Path("runs/tiny/recipe.toml")
    recipe.write_text(set_by_the_user.sub("", recipe.read_text()))
    recorded.write_text(recorded.read_text() + '[later]\nname = "x"\n')
    with other_defaults(NEW_DEFAULTS):
        recorder = train(recipe, mode="resume")
    losses, done = values(recorder, "step", "loss"), old["stopped_after"]
    if old["same_arithmetic"]:
        assert losses == old["losses"][done:]
        assert hashes(recipe, len(old["losses"])) == old["checkpoint"]
    else:
        assert losses == pytest.approx(old["losses"][done:], rel=1e-2)
    (said,) = [message for message in values(recorder, "notice", "message") if "recipe.toml" in message]
    assert said.endswith("keys that this version does not know are not read: later")


def test_an_export_is_finished(old: dict[str, Any]) -> None:
    export = Path("runs/tiny/export")
    points = json.loads((export / ".hf.part" / "journal.json").read_text())["points"]
    recorder = Recorder()
    api.merge_and_export("runs/tiny", options=api.export_options(verify=False), sink=recorder)
    assert any("kept no hash of the base" in text for text in values(recorder, "notice", "message"))
    assert [path.name for path in export.iterdir()] == ["hf"] and verify_folder(export / "hf") is None
    if qlora.__version__ == old["version"]:  # another version's half is begun anew
        at_the_point = sum(size for size, _ in points[-1]["files"].values())
        merged = [event.as_dict() for event in recorder.of("progress") if event.as_dict()["task"] == "merge"]
        assert 0.9 * at_the_point < merged[0]["done"] < at_the_point  # the file's header is in front
    if old["same_arithmetic"]:
        assert {path.name: sha256_file(path) for path in (export / "hf").glob("*.safetensors")} == old["export"]


def test_its_loss_is_compared_with_its_events_and_with_two_of_them_not(
    old: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "reopen", lambda merge, targets: {key: [] for key in targets})
    said, events = Recorder(), Path("runs/tiny/events.jsonl")
    loss = api.merge_and_export("runs/tiny", out="first", sink=said).evaluation
    assert loss is not None and loss.here == pytest.approx(loss.delivered, rel=1e-2)
    step = json.loads(Path("runs/tiny/adapter/qlora.json").read_text())["step"]
    (line,) = [line for line in events.read_text().splitlines() if '"eval", ' in line and f'"step": {step},' in line]
    events.write_text(events.read_text() + line.replace('"loss": ', '"loss": 1') + "\n")
    assert api.merge_and_export("runs/tiny", out="second", sink=said).evaluation is None
    assert any("recorded no loss that could be compared" in message for message in values(said, "notice", "message"))
