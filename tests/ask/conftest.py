"""An adapter that has moved, and what was exported of it: made once for the files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.cases import KINDS, exported, trained


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked") / "tuned"
    trained(llama, folder, KINDS["plain"])
    return folder


@pytest.fixture(scope="session")
def exports(adapter: Path) -> dict[str, Path]:
    """A merged folder and a GGUF file, in 16 bit."""
    report = exported(adapter, to=["hf", "gguf"], quants=["f16"])
    return {product.format.partition("-")[0]: product.folder for product in report.products}
