"""One version: what the build reads is what the package says, and what its page of changes begins with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from qlora.version import __version__

ROOT = Path(__file__).parent.parent


def test_the_build_reads_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [__version__]


def test_the_installed_package_is_of_this_version() -> None:
    assert importlib.metadata.version("qlora") == __version__


def test_the_page_of_changes_begins_with_it() -> None:
    text = (ROOT / "qlora" / "CHANGES.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[0] == __version__
