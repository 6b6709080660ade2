"""The table of endings."""

from __future__ import annotations

import tomllib
from importlib import import_module

from qlora.data.documents.kinds import KINDS
from tests.data.documents.cases import ROOT


def test_every_kind_has_its_reader_and_its_packages_stand_in_the_extra() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = " ".join(tomllib.load(file)["project"]["optional-dependencies"]["documents"])
    for ending, kind in KINDS.items():
        assert ending == ending.lower() and kind.max_bytes <= 256 << 20
        assert callable(import_module(f"qlora.data.documents.{kind.module}").parse)
        for module, name in kind.packages:
            assert import_module(module) and name in extra
