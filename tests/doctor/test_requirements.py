"""Python and packages beside their bounds: old, too new, missing, and the commands that mend it."""

from __future__ import annotations

import tomllib
from importlib import metadata

import pytest

from qlora.doctor import requirements
from qlora.doctor.finding import Colour
from qlora.doctor.requirements import Installed, Requirement, parsed, satisfies
from tests.doctor.cases import only
from tests.floors import ROOT


@pytest.mark.parametrize(
    ("version", "bounds", "holds"),
    [
        ("2.13.0+cu130", ">=2.10,<2.14", True),
        ("2.9.1", ">=2.10,<2.14", False),
        ("2.14.0", ">=2.10,<2.14", False),
        ("2.14.0a0+git1f3", ">=2.10,<2.14", False),
        ("2.10rc1", ">=2.10", False),
        ("2.10.post1", ">=2.10", True),
        ("5.3", ">=5.3", True),
        ("5.3.0", "==5.3", True),
        ("5.4", "==5.3.*", False),
        ("5.3.9", "==5.3.*,!=5.3.8", True),
        ("5.3.8", "==5.3.*,!=5.3.8", False),
        ("1.4.9", "~=1.4.2", True),
        ("1.5", "~=1.4.2", False),
        ("2026.10.11549", ">=2026.10", True),
        ("who knows", ">=2", True),
        ("2.0", "", True),
    ],
)
def test_versions_are_compared_as_pip_does(version: str, bounds: str, holds: bool) -> None:
    assert satisfies(version, bounds) is holds


def test_bounds_of_the_project_can_all_be_read() -> None:
    """And as packaging, which pip has inside, reads them."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        found, wanted = parsed(line), requirement(line)
        assert found is not None and found.name == wanted.name
        for version in ("0.1", "0.50", "1.2", "2.10", "2.13.9", "2.14", "5.3", "16", "30", "9999"):
            assert satisfies(version, found.bounds) is wanted.specifier.contains(version), (line, version)
    assert parsed('xllamacpp>=2026.10; extra == "gguf"') == Requirement("xllamacpp", ">=2026.10", "gguf")
    assert parsed("qlora[documents] ; extra == 'test'") == Requirement("qlora", "", "test")
    assert parsed("!") is None


def installed(**versions: str) -> Installed:
    wanted = (Requirement("torch", ">=2.10,<2.14"), Requirement("peft", ">=0.21"), Requirement("x", ">=3", "plot"))
    return Installed(wanted, versions)


def test_each_that_is_wrong_has_a_line_with_its_command() -> None:
    found = requirements.of_packages(installed(torch="2.9", x="2"))
    assert only(found, "packages").said.startswith("0 of 2 ")
    torch, peft, extra = (only(found, name) for name in ("torch", "peft", "x"))
    assert (torch.colour, torch.mend) == (Colour.RED, 'pip install --upgrade "torch>=2.10,<2.14"')
    assert (peft.colour, peft.mend) == (Colour.RED, 'pip install "peft>=0.21"')
    assert (extra.colour, extra.mend) == (Colour.YELLOW, 'pip install --upgrade "x>=3"')


def test_an_extra_that_is_not_there_is_no_fault() -> None:
    found = requirements.of_packages(installed(torch="2.13", peft="0.21.2"))
    assert {one.colour for one in found} == {Colour.GREEN}
    assert 'pip install "qlora[plot]"' in only(found, "extras").here
    assert only(found, "packages").figures == {"peft": "0.21.2", "torch": "2.13"}


def test_without_metadata_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.metadata, "metadata", none)
    assert requirements.read() is None
    assert requirements.of_packages(None)[0].colour == Colour.YELLOW


def test_what_is_installed_here_is_within_its_bounds() -> None:
    found = requirements.read()
    assert found is not None and "torch" in found.versions
    assert {one.colour for one in requirements.of_packages(found)} == {Colour.GREEN}
    assert requirements.python(found).colour == Colour.GREEN
    assert requirements.named(found, "torch").startswith('"torch>=2') and requirements.named(None, "a") == '"a"'


def test_a_python_that_will_not_do() -> None:
    assert requirements.of_python((3, 10, 2), ">=3.11", 64, False).colour == Colour.RED
    assert requirements.of_python((3, 12, 2), ">=3.11", 32, False).colour == Colour.RED
    assert requirements.of_python((3, 14, 2), ">=3.11", 64, True).colour == Colour.YELLOW
