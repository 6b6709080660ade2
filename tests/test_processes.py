"""A run is one process: each launcher's own word for several is refused, and one of one is none."""

from __future__ import annotations

import pytest

from qlora import processes
from qlora.errors import HardwareError


@pytest.mark.parametrize("name", processes.SIZES)
def test_one_of_several_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(HardwareError, match=f"^{name}=2: .*one process on one GPU"):
        processes.refuse_several()


@pytest.mark.parametrize("value", ["1", "0", "", "many", "²", "9" * 30])
def test_one_process_may_train(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    processes.refuse_several()
