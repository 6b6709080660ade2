"""What a simulation gave is read from the disk, as from a stranger, in place of drawing a model once more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.memory import shelf, simulate
from qlora.memory.repeated import RepeatedOperations
from qlora.memory.shelf import Shelf
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Simulation, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config

WORKLOAD = Workload(1, 64)
SPEC = ModelSpec(make_config("llama", vocab=512), "tiny", LoraSection(r=4), QuantizationSection())


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An empty cache, and the layers of each model that is drawn."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    layers: list[int] = []
    draw = simulate._MetaModel.__init__

    def counted(self: Any, spec: ModelSpec, of: int, repeated: RepeatedOperations) -> None:
        layers.append(of)
        draw(self, spec, of, repeated)

    monkeypatch.setattr(simulate._MetaModel, "__init__", counted)
    return layers


def run(spec: ModelSpec = SPEC, workload: Workload = WORKLOAD) -> tuple[Simulation, Any]:
    simulator = Simulator(spec, True, Shelf())
    return simulator.run(workload), simulator.drawn


def the_file(folder: Path) -> Path:
    (file,) = (folder / shelf.FOLDER).glob("*.json")
    return file


def test_a_second_process_draws_nothing_and_knows_the_same(tmp_path: Path, drawn: list[int]) -> None:
    first = run()
    assert len(drawn) == 1
    assert run() == first and len(drawn) == 1
    assert the_file(tmp_path).stat().st_size < shelf.MAX_BYTES // 2


@pytest.mark.parametrize(
    "other",
    [
        (ModelSpec(SPEC.text, "tiny", LoraSection(r=8), SPEC.quantization), WORKLOAD),
        (ModelSpec(SPEC.text, "tiny", SPEC.lora, QuantizationSection(type="fp4")), WORKLOAD),
        (ModelSpec(make_config("llama", vocab=520), "tiny", SPEC.lora, SPEC.quantization), WORKLOAD),
        (SPEC, Workload(1, 72)),
    ],
    ids=["rank", "quantization", "config", "workload"],
)
def test_another_question_is_another_simulation(other: tuple[ModelSpec, Workload], drawn: list[int]) -> None:
    run()
    run(*other)
    assert len(drawn) == 2


def test_other_versions_are_other_simulations(drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(shelf, "_versions", lambda: ("other bytes of our own source",))
    run()
    assert len(drawn) == 2


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(b"[" * 10_000),
        lambda file: file.write_bytes(file.read_bytes() + b" " * shelf.MAX_BYTES),
        changed(lambda content: content["kept"].update(weights=-1)),
        changed(lambda content: content["kept"].pop("weights")),
        changed(lambda content: content["phases"].pop("update")),
        changed(lambda content: content["phases"]["load"]["parts"].update(more=1)),
        changed(lambda content: content.update(key="0" * 64)),
        changed(lambda content: content.update(reserved=[0, 1])),
        changed(lambda content: content.update(drawn=[1, 2, 3, 4, 1.5])),
    ],
)
def test_what_is_not_sound_is_simulated_again(
    damage: Callable[[Path], object], tmp_path: Path, drawn: list[int]
) -> None:
    first = run()
    damage(the_file(tmp_path))
    assert run() == first and len(drawn) == 2


def test_a_link_is_not_followed_and_a_folder_that_cannot_be_written_is_no_reason_to_fail(
    tmp_path: Path, drawn: list[int]
) -> None:
    first = run()
    file = the_file(tmp_path)
    elsewhere = tmp_path / "elsewhere.json"
    os.replace(file, elsewhere)
    file.symlink_to(elsewhere)
    assert run() == first and len(drawn) == 2
    (folder := tmp_path / shelf.FOLDER).rename(tmp_path / "gone")
    folder.write_text("no folder")
    assert run() == first and len(drawn) == 3


def test_old_ones_are_forgotten(tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "KEPT_FILES", 2)
    for length in (8, 16, 24):
        run(workload=Workload(1, length))
    assert len(list((tmp_path / shelf.FOLDER).glob("*.json"))) == 2
    run(workload=Workload(1, 24))
    assert len(drawn) == 3
