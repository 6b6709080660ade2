"""What several rooms' tests share: a cache of their own, and a tiny base that is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tiny models gain nothing from a second thread, and two that wait for each other lose much.
os.environ["OMP_NUM_THREADS"] = "1"  # and a child forked from threads would hang


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tokenizer and chat template."""
    from tests.families import make_base

    return make_base("llama", tmp_path_factory.mktemp("base") / "llama")
