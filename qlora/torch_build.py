"""What the installed torch was built for, read from its `version.py`: torch itself is not imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora import files

MOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class TorchBuild:
    """Versions as torch writes them: "2.13.0+cu130", "13.0". None: it is not built for that maker's GPUs."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None

    @property
    def cuda_major(self) -> int | None:
        major = (self.cuda or "").partition(".")[0]
        return int(major) if major.isascii() and major.isdecimal() else None


def installed() -> TorchBuild | None:
    """The torch that this Python would import; None where there is none, or one that does not say."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        file = (Path(found.origin).parent / "version.py").resolve()
        return parsed(files.read_bytes(file, MOST_BYTES).decode("utf-8", "replace"))
    except (OSError, files.UnsafePathError):
        return None


def parsed(text: str) -> TorchBuild | None:
    """From the text of `version.py`: plain assignments of strings and None."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return None
    values: dict[str, str | None] = {}
    for one in statements:
        target = (
            one.targets[0] if isinstance(one, ast.Assign) else one.target if isinstance(one, ast.AnnAssign) else None
        )
        value = getattr(one, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str | None):
            values[target.id] = value.value
    version = values.get("__version__")
    return TorchBuild(version, values.get("cuda"), values.get("hip"), values.get("xpu")) if version else None
