"""What tests of exports share: one export that several files of tests reopen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.cases import KINDS
from tests.export.reopened import Case


@pytest.fixture(scope="session")
def case(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(llama, tmp_path_factory.mktemp("verify"), KINDS["plain"])
