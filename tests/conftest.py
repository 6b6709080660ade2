"""What several rooms' tests share: a cache of their own, and a tiny base that is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tiny models gain nothing from a second thread, and two that wait for each other lose much.
os.environ["OMP_NUM_THREADS"] = "1"  # and a child forked from threads would hang


# Files of minutes: the first to be begun, since a file's tests stay in one process and the others fill what is left.
LONGEST = (
    *("tests/test_manuals.py", "tests/test_quickstart.py", "tests/faults/test_signals.py", "tests/faults/test_kill.py"),
    *("tests/faults/test_resume_everywhere.py", "tests/attacks/test_fuzz.py", "tests/cli/test_verify_resume.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests, then the others; within a file as it is written."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = {Path(__file__).parent.parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(LONGEST) + (item.path not in slow)))


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
