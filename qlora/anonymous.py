"""What may be attached to a public report: texts without paths, and without the names of a user, machine or home."""

from __future__ import annotations

import getpass
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_SHORTEST = 3  # a shorter name would stand in ordinary text by chance
# An address of the web stays as it is; a path of Windows, and one of several parts that begins with a slash, goes.
_PATH = re.compile(r"(?P<web>https?://\S+)|[A-Za-z]:\\[^\s,;:]+|(?<![\w.…])/[\w.@+~-]+(?:/[\w.@+~-]*)+")


def text(said: str) -> str:
    """The text without paths, and without the names of this user, machine and home."""
    said = _PATH.sub(lambda found: found["web"] or "…", said)
    for word in _names():
        said = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", "…", said)
    return said


def values(value: Any) -> Any:
    """A value of plain types with every text in it, but not its keys, made anonymous."""
    if isinstance(value, dict):
        return {key: values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [values(inner) for inner in value]
    return text(value) if isinstance(value, str) else value


def _names() -> Iterator[str]:
    """Longer ones first: a home is in other paths, and a user's name in the home."""
    found = {platform.node(), platform.node().partition(".")[0]}
    with suppress(OSError):  # no folder for temporary files can be written: the disk may be full
        found.add(tempfile.gettempdir())
    with suppress(RuntimeError):
        found.add(str(Path.home()))
    with suppress(OSError, KeyError, ImportError):  # a user id without a name; Windows has no such list
        found.add(getpass.getuser())
    found |= {os.environ.get(name, "") for name in ("HOME", "USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME")}
    yield from sorted((name for name in found if len(name) >= _SHORTEST), key=len, reverse=True)
