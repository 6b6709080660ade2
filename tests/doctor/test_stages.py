"""What is tried, on what is here and on the stand-in for a card: real arithmetic, real 4 bit, real allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.doctor import stages, tried
from qlora.doctor.finding import Colour
from qlora.doctor.stages import STAGES
from qlora.doctor.trial import Trial
from qlora.errors import HardwareError
from tests.card import Card, rehearsal
from tests.doctor.cases import trials


def judged(stage: str) -> Any:
    trial = Trial(stage, STAGES[stage].run())
    (found,) = [one for one in tried.findings({**trials(), stage: trial}, None) if one.name == NAMES[stage]]
    return found


NAMES = {
    "bf16": "bf16",
    "nf4": "NF4",
    "paged": "paged memory",
    "pinned": "locked memory",
    "bitsandbytes": "bitsandbytes",
}


@pytest.mark.parametrize("stage", NAMES)
def test_this_machine_does_what_is_asked(stage: str) -> None:
    assert judged(stage).colour == Colour.GREEN, judged(stage)


def test_the_table_is_the_papers() -> None:
    """Its values are those of bitsandbytes, and each value becomes the nearest of them."""
    import bitsandbytes

    theirs = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.allclose(theirs, torch.tensor(stages.NF4), atol=1e-6)
    weight = torch.tensor([[0.5] * 63 + [1.0]])
    back = stages.by_the_paper(weight)
    assert back[0, 0] == pytest.approx(0.4407098) and back[0, 63] == 1.0


def test_a_quantizer_that_is_wrong_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *of: real(*of).roll(1))
    found = judged("nf4")
    assert found.colour == Colour.RED and "pip install --force-reinstall" in found.mend


def test_a_native_library_that_does_not_load_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    class ErrorHandlerMock:
        pass

    monkeypatch.setattr(bitsandbytes.cextension, "lib", ErrorHandlerMock())
    assert judged("bitsandbytes").colour == Colour.RED


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card()):
        answer = STAGES["device"].run()
        paged = STAGES["paged"].run()
        pinned = STAGES["pinned"].run()
    assert answer["on_card"] and answer["capability"] == "8.6" and answer["free_bytes"] <= answer["total_bytes"]
    assert paged == {"bytes": stages.PAGED_BYTES, "wrong": 0, "on_card": True}
    assert pinned["pinned"] in (True, False)


def test_our_own_errors_keep_their_hint() -> None:
    def refuse() -> dict[str, Any]:
        raise HardwareError("its driver is too old", "install a newer one")

    assert stages.tried(refuse) == {"failure": "its driver is too old", "mend": "install a newer one"}


def test_memory_is_locked_or_not() -> None:
    assert stages.locks(4096) in (True, False, None)
    limit = stages.lock_limit()
    assert limit is None or limit >= -1
