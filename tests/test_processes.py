"""What a launcher says of a process: its place among several, which is training's to use, and refused by all else."""

from __future__ import annotations

import pytest

from qlora import processes
from qlora.errors import HardwareError
from qlora.processes import ALONE, Place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def told(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> Place:
    for name, value in {**TORCHRUN, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return processes.launched()


@pytest.mark.parametrize("name", processes.SIZES)
def test_one_of_several_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(HardwareError, match=f"^{name}=2: .*one process on one GPU"):
        processes.refuse_several()
    with processes.taken(Place(0, 2, 0, 2)):
        processes.refuse_several()
        assert processes.of_run() == Place(0, 2, 0, 2)
    assert processes.of_run() == ALONE


@pytest.mark.parametrize("value", ["1", "0", "", "many", "²", "9" * 30])
def test_one_process_may_train(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    processes.refuse_several()
    assert processes.launched() == ALONE


def test_torchrun_says_which_it_is_and_accelerate_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch) == Place(3, 4, 1, 2)
    assert told(monkeypatch, LOCAL_WORLD_SIZE=None) == Place(3, 4, 1, 4)
    assert told(monkeypatch, LOCAL_WORLD_SIZE=None, LOCAL_RANK=None) == Place(3, 4, 3, 4)


@pytest.mark.parametrize("changes", [{"RANK": None}, {"RANK": "4"}, {"MASTER_ADDR": None}, {"MASTER_PORT": ""}])
def test_half_of_it_is_refused(changes: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HardwareError, match="WORLD_SIZE=4, but RANK"):
        told(monkeypatch, **changes)


def test_another_launcher_s_several_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match="OMPI_COMM_WORLD_SIZE=2"):
        told(monkeypatch, WORLD_SIZE=None)
