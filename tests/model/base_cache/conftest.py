"""A cache of each test's own, and a small base whose files are old enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import make_base
from tests.model.base_cache.cases import aged


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return aged(make_base("llama", tmp_path / "base", shards=2))
