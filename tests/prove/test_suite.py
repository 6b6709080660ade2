"""All proofs: each is tried whatever the others do, in a folder that is gone at the end."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora.errors import DataError, DoesNotFit, HardwareError
from qlora.prove import suite
from qlora.prove.proof import Outcome, Place, Proof
from tests.prove.cases import place

FINE = Proof("fine", "p", "t", "s", lambda place: Outcome(True, "yes"))


def failing(error: BaseException) -> Proof:
    def run(place: Place) -> Outcome:
        raise error

    return replace(FINE, name=type(error).__name__, run=run)


def test_an_error_is_a_broken_promise_and_the_others_go_on(tmp_path: Path) -> None:
    fault, full = RuntimeError("CUDA error: unspecified launch failure"), torch.OutOfMemoryError("CUDA out of memory.")
    errors = DataError("a row", "mend it"), KeyError("a name"), fault, full
    told: list[str] = []
    proofs = [*map(failing, errors), FINE]
    results = suite.run_all(place(tmp_path), proofs, lambda proof: told.append(proof.name))
    assert [result.outcome.holds for result in results] == [False, False, False, False, True]
    assert told == ["DataError", "KeyError", "RuntimeError", "OutOfMemoryError", "fine"]
    said = [result.outcome.said for result in results]
    assert said[0] == "a row (mend it)" and said[1] == "KeyError: 'a name'"
    assert said[2].startswith("the GPU failed while trying RuntimeError")
    assert said[3].startswith("out of memory while trying OutOfMemoryError")


def test_who_stops_it_is_obeyed_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", "mine")
    seen: list[Path] = []
    with pytest.raises(KeyboardInterrupt), suite.place_for("cpu", None) as where:
        seen.append(where.folder)
        assert where.folder.is_dir() and os.environ["QLORA_CACHE"].startswith(str(where.folder))
        (where.folder / "left").write_text("something")
        suite.run_all(where, [failing(KeyboardInterrupt())])
    assert not seen[0].exists() and os.environ["QLORA_CACHE"] == "mine"


def test_what_is_not_there_or_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.hardware, "current", lambda: torch.device("cpu"))
    with pytest.raises(HardwareError, match="cuda: no such device here"), suite.place_for("cuda", None):
        pass
    monkeypatch.setattr(suite.hardware, "free_bytes", lambda _: 2**30)
    said = r"a random 8b model needs about 7\.6 GiB, 1\.0 are free"
    with pytest.raises(DoesNotFit, match=said), suite.place_for("cpu", "8b"):
        pass


@pytest.mark.parametrize("named", ["cuda", None])
def test_a_card_has_its_index_which_limits_ask_for(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.hardware, "current", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(suite.hardware, "free_bytes", lambda _: 2**40)
    with suite.place_for(named, None) as place:
        assert place.device == torch.device("cuda", 0) and place.on_card


def test_names_are_unique_and_everything_is_said() -> None:
    assert len({proof.name for proof in suite.PROOFS}) == len(suite.PROOFS)
    assert all(proof.promise and proof.tolerance and proof.source for proof in suite.PROOFS)
