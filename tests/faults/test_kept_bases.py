"""kill -9 at any call while a base is kept: nothing of it is there, or all of it, and the next start is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import disk
from qlora.model.base_cache import places
from qlora.recipe.sections import QuantizationSection
from tests.families import make_base
from tests.faults.cases import EVERY, tripwire
from tests.faults.forks import finished, fork
from tests.model.base_cache.cases import aged, assert_same, kept, load
from tests.sampling import sampled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork")]


def loading(base: Path, at: int, counts: Path | None = None) -> Any:
    def work(_: Callable[[str], None]) -> None:
        with tripwire(at) as seen:
            load(base)
        if counts:
            counts.write_text(str(len(seen)))

    return fork(work)


BEFORE = ("nothing", "another form", "a damaged one", "a kept one")


@pytest.mark.parametrize("before", sampled(BEFORE, "nothing", "a damaged one"))
def test_a_kill_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    base = aged(make_base("llama", tmp_path / "base"))
    plain, _ = load(base, cache=False)

    def world(name: str) -> None:
        monkeypatch.setenv("QLORA_CACHE", str(tmp_path / name))
        if before == "another form":
            load(base, QuantizationSection(type="fp4"))
        elif before != "nothing":
            load(base)
            if before == "a damaged one":
                os.truncate(kept()[0] / "layer-00001.blob", 10)

    world("counted")
    finished(loading(base, 0, tmp_path / "count"))
    calls = int((tmp_path / "count").read_text())
    assert calls > (20 if before == "a kept one" else 60)
    for at in range(1, calls + 1, EVERY):
        world(f"at{at}")
        child = loading(base, at)
        assert child.wait() == -signal.SIGKILL, (at, child.rest())
        for folder in kept():
            whole = disk.verify_folder(folder) is None
            assert whole or before == "a damaged one", (at, folder)
        first, _ = load(base)
        second, said = load(base)
        assert_same(first, plain)
        assert_same(second, plain)
        assert second.base_was_kept, (at, said)
        left = [path.name for path in places.root().iterdir() if path.name.startswith(".") and path.name != ".lock"]
        left += [path.name for path in places.root().glob("*.use-*")]
        assert not left or first.base_was_kept, (at, left)
