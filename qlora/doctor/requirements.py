"""Python and the installed packages beside the bounds that this package was installed with. Nothing is imported.

The bounds are those of pyproject.toml, as pip has written them into the installed metadata (core metadata,
`Requires-Dist` and `Requires-Python`); versions are compared by the numbers of their release (PEP 440).
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from qlora.doctor.finding import Finding, green, red, yellow

OURS = "qlora"
# Extras of ours that a user installs; the others are for whoever changes this program.
EXTRAS = ("gguf", "documents", "plot")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_BOUND = re.compile(r"\s*(>=|<=|==|!=|~=|>|<)\s*([0-9][0-9A-Za-z.*+!-]*)\s*")
_RELEASE = re.compile(r"v?(?:[0-9]+!)?([0-9]+(?:\.[0-9]+)*)(.*)")


@dataclass(frozen=True)
class Requirement:
    """A package with its bounds (">=2.10,<2.14"), and the extra of ours that wants it; "" for one that all need."""

    name: str
    bounds: str
    extra: str = ""

    @property
    def text(self) -> str:
        """As pip takes it, in quotes: a shell reads `<` and `>` as its own."""
        return f'"{self.name}{self.bounds}"'


@dataclass(frozen=True)
class Installed:
    """What the metadata of this Python's packages says. `python` is our own bound of Python's version."""

    requirements: tuple[Requirement, ...]
    versions: Mapping[str, str]
    python: str = ">=3.11"


def read() -> Installed | None:
    """None where we are not installed as a package, and nothing says what is needed."""
    try:
        ours = metadata.metadata(OURS)
    except metadata.PackageNotFoundError:
        return None
    wanted = [parsed(line) for line in ours.get_all("Requires-Dist") or ()]
    found = tuple(one for one in wanted if one is not None and one.name != OURS and one.extra in ("", *EXTRAS))
    versions = {one.name: version for one in found if (version := _version(one.name))}
    return Installed(found, versions, "".join(ours.get_all("Requires-Python") or ()) or ">=3.11")


def parsed(line: str) -> Requirement | None:
    """A line of `Requires-Dist`; None for one that has another form."""
    match = _REQUIREMENT.fullmatch(line)
    if match is None:
        return None
    extra = _EXTRA.search(match[3] or "")
    bounds = sorted(
        match[2].replace(" ", "").split(","), key=lambda bound: not bound.startswith(">")
    )  # the floor first
    return Requirement(match[1], ",".join(bounds), extra[1] if extra else "")


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version lies in bounds such as ">=2.10,<2.14"; what cannot be read is let pass."""
    found = _RELEASE.fullmatch(version.strip())
    if found is None:
        return True
    release, early = _numbers(found[1]), re.match(r"[-_.]?(a|b|c|rc|dev|alpha|beta|pre)", found[2]) is not None
    for text in filter(None, bounds.split(",")):
        bound = _BOUND.fullmatch(text)
        if bound is not None and not _holds(release, early, bound[1], bound[2]):
            return False
    return True


def _holds(release: tuple[int, ...], early: bool, operator: str, text: str) -> bool:
    wanted = _RELEASE.fullmatch(text.removesuffix(".*"))
    if wanted is None:
        return True
    stem = _numbers(wanted[1])
    width = max(len(release), len(stem))
    ours, theirs = (numbers + (0,) * (width - len(numbers)) for numbers in (release, stem))
    same = ours[: len(stem)] == stem if text.endswith(".*") else ours == theirs
    if operator in ("==", "!="):
        return same == (operator == "==")
    if operator == "~=":
        return ours >= theirs and ours[: len(stem) - 1] == stem[:-1]
    if operator in (">=", ">"):  # 2.10rc1 is older than 2.10
        return ours > theirs or (operator == ">=" and ours == theirs and not (early and not wanted[2]))
    return ours < theirs or (operator == "<=" and ours == theirs)  # 2.14rc1 is no version below 2.14 (PEP 440)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part[:9]) for part in text.split("."))


def _version(name: str) -> str:
    try:
        return str(metadata.version(name) or "")
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return ""


def of_python(version: Sequence[int], bounds: str, bits: int, free_threaded: bool) -> Finding:
    """The Python that runs this: `version` as (3, 11, 4)."""
    said = ".".join(map(str, version[:3]))
    if not satisfies(said, bounds):
        return red("Python", f"{said}, and {bounds} is needed", "install a newer Python, and this program in it")
    if bits != 64:
        return red("Python", f"{said} of {bits} bits: torch has none", "install Python of 64 bits")
    if free_threaded:
        return yellow("Python", f"{said} without its lock: few packages are built for it", "use the usual build of it")
    return green("Python", said, figures={"version": said})


def python(installed: Installed | None) -> Finding:
    bits = 64 if sys.maxsize > 2**32 else 32
    without_lock = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    return of_python(sys.version_info[:3], installed.python if installed else ">=3.11", bits, without_lock)


def of_packages(installed: Installed | None) -> list[Finding]:
    """A line for all that are as they must be, one for each that is not, and one for extras that are not there."""
    if installed is None:
        said = "this program is not installed as a package, so nothing says which versions it needs"
        return [yellow("packages", said, "pip install -e . in its folder")]
    needed = [one for one in installed.requirements if not one.extra]
    wrong = [finding for one in installed.requirements if (finding := _wrong(one, installed.versions.get(one.name)))]
    bad = {finding.name for finding in wrong}
    versions = dict(sorted(installed.versions.items()))
    good = [one for one in needed if one.name not in bad]
    said = f"{len(good)} of {len(needed)} that are needed lie within their bounds"
    found = [green("packages", said, figures=versions), *wrong]
    extras = sorted({one.extra for one in installed.requirements if one.extra and one.name not in installed.versions})
    if extras:
        named = ", ".join(f'pip install "{OURS}[{extra}]"' for extra in extras)
        found.append(green("extras", f"not installed, and needed for some things alone: {', '.join(extras)}", named))
    return found


def _wrong(one: Requirement, version: str | None) -> Finding | None:
    if version is None:
        return None if one.extra else red(one.name, "is not installed", f"pip install {one.text}")
    if satisfies(version, one.bounds):
        return None
    mend = f"pip install --upgrade {one.text}"
    said = f"{version} is installed, and {one.bounds} is needed"
    return yellow(one.name, f"{said} for {one.extra}", mend) if one.extra else red(one.name, said, mend)


def named(installed: Installed | None, name: str) -> str:
    """A package as pip takes it, with the bounds that are known of it."""
    known = (one.text for one in (installed.requirements if installed else ()) if one.name == name)
    return next(known, f'"{name}"')
