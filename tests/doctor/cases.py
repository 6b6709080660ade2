"""What tests of the doctor share: packages that break in each way, findings by name, and a child that serves stages."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora import disk
from qlora.doctor.finding import Finding
from qlora.doctor.stages import STAGES, serve
from qlora.doctor.trial import Trial

CHILD = "tests.doctor.cases"  # this file: it serves the stages without a look at the device


KEY = "0123456789abcdef" * 2  # of cached rows


def published(folder: Path, kind: str, change: bool = False) -> Path:
    """A folder of ours of that kind; `change`: somebody has written into it since."""

    def write(here: Path) -> None:
        (here / "x.bin").write_bytes(b"1" * 100)

    folder.parent.mkdir(parents=True, exist_ok=True)
    disk.publish_folder(folder, write, {"kind": kind})
    if change:
        (folder / "x.bin").write_bytes(b"other")
    return folder


def package(folder: Path, name: str, code: str) -> None:
    """A package of that name, found before the installed one by who has `folder` first on its path."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)


def only(findings: Iterable[Finding], name: str) -> Finding:
    (found,) = [one for one in findings if one.name == name]
    return found


def trials(**answers: Mapping[str, Any] | str) -> dict[str, Trial]:
    """An outcome for each stage: {} where none is given; a text is a failure."""
    found = {}
    for stage in STAGES:
        answer = answers.get(stage.replace(".", "_"), WELL.get(stage, {"version": "1.0"}))
        found[stage] = Trial(stage, failure=answer) if isinstance(answer, str) else Trial(stage, answer)
    return found


WELL: dict[str, Mapping[str, Any]] = {
    "device": {"on_card": False, "name": "cpu", "notices": [], "may_spill": False, "computes_bf16": True},
    "bf16": {"apart": 0.002},
    "bitsandbytes": {"version": "0.50.2", "native": True},
    "nf4": {"apart": 0.001, "values": 65536, "bytes": 32768},
    "paged": {"why_not": "paging needs a CUDA GPU", "on_card": False},
    "pinned": {"pinned": None, "locked": True, "limit": 8 << 20},
    "llama.cpp": {"package": "xllamacpp", "version": "2026.10"},
}

if __name__ == "__main__":
    serve(sys.argv[1:], list)
