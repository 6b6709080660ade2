"""What a command finds when it begins, made fit to work in: its three streams, and a home for what libraries keep.

A stream may be closed (`2>&-`), missing (a process without a console), full, or read by nobody; a home may be missing
(a container's user without a name). None of these decides how a command ends, and of what others write to stderr
(warnings, loggers) nothing steers the terminal.
"""

from __future__ import annotations

import codecs
import getpass
import io
import os
import stat
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import IO, Any

from qlora import files, shown

# Folders that libraries use, by their variables, and where each is in a home of our making.
_PLACES = {
    "QLORA_CACHE": "qlora",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_HOME": "triton",
}
# Variables that name a place, which `~` may begin.
_NAMED = (*_PLACES, "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_DATASETS_CACHE")
# What our screens draw with, in ASCII: bars, rules, separators.
_NEAREST = {
    "█": "#",
    "─": "-",
    "━": "-",
    "│": "|",
    "·": "-",
    "…": "~",
    "→": ">",
    "–": "-",
    "—": "-",
    "•": "*",
    "×": "x",
    "«": "[",
    "»": "]",
    "↵": "\\",
}


class NoOutput(io.TextIOBase):
    """stdout where there is none: what is printed goes nowhere, and `lost` says that something was."""

    encoding = "utf-8"
    lost = False

    def write(self, text: str) -> int:
        self.lost = self.lost or bool(text)
        return len(text)


class PlainErrors(io.TextIOBase):
    """stderr as everybody else writes to it: without control sequences, and without failing when it can't be written.

    What is ours is written by `write_errors`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def write(self, text: str) -> int:
        write_errors(self, shown.block(text))
        return len(text)

    def flush(self) -> None:
        write_errors(self, "")

    def isatty(self) -> bool:
        return bool(self.inner.isatty())

    def fileno(self) -> int:
        return int(self.inner.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self.inner.encoding)

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return str(self.inner.errors)


def write_errors(stream: Any, text: str) -> None:
    """Write text of our own, colours included, past the gate; if stderr can't be written any more, nowhere."""
    inner = stream.inner if isinstance(stream, PlainErrors) else stream
    try:
        inner.write(text)
        inner.flush()
    except (OSError, ValueError):
        drop_output(2)


def drop_output(*handles: int) -> None:
    """Nobody reads these any more (1 is stdout, 2 stderr): what is still written goes nowhere, and fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in handles:
        os.dup2(nowhere, handle)
    os.close(nowhere)


def prepare() -> None:
    """Before a command does anything, and before it opens any file: one may get the number of a closed stream.

    Raises UserError for a variable that names no place.
    """
    _open_streams()
    _have_a_size()
    _have_a_name()
    _have_places()


def _open_streams() -> None:
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            # The lowest free number is given: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if handle == 0 else os.O_WRONLY), True)
    sys.stdin = sys.stdin or _nowhere("r")
    sys.stdout = _encodable(sys.stdout or NoOutput())
    sys.stderr = _encodable(sys.stderr or _nowhere("w"))
    if not isinstance(sys.stderr, PlainErrors):
        sys.stderr = PlainErrors(sys.stderr)


def _nowhere(mode: str) -> IO[str]:
    return open(os.devnull, mode, encoding="utf-8")


def _encodable(stream: Any) -> Any:
    """What the stream's encoding lacks becomes what is nearest in ASCII; and no byte of a name is written as it is."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error("qlora.nearest", _nearest)
        stream.reconfigure(errors="qlora.nearest")
    return stream


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """A handler of the codec machinery: one letter for one, so that columns stay where they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_NEAREST.get(letter) or _base_letter(letter) for letter in text), error.end


def _base_letter(letter: str) -> str:
    """`e` for `é`, `2` for `²`; `?` where Unicode knows no ASCII letter in it."""
    return next((part for part in unicodedata.normalize("NFKD", letter) if part.isascii()), "?")


def _have_a_size() -> None:
    """A size of the terminal that is none is left out: rich takes `²` for a digit, and draws lines of any width."""
    for name in ("COLUMNS", "LINES"):
        value = os.environ.get(name, "1")
        if not (value.isascii() and value.isdecimal() and len(value) <= 4):
            del os.environ[name]


def _have_places() -> None:
    if os.environ.get("HOME") == "":  # `~` would be the root of the file system
        del os.environ["HOME"]
    for name in _NAMED:
        if os.environ.get(name, "").startswith("~"):
            os.environ[name] = str(files.user_path(os.environ[name], name))
    if _has_home():
        return
    missing = [name for name in _PLACES if name not in os.environ]
    home = _home_of_our_making() if missing else Path()
    os.environ.update({name: str(home / _PLACES[name]) for name in missing})


def _have_a_name() -> None:
    """torch's compiler names its cache after the user, whose id may have no name in a container."""
    try:
        getpass.getuser()
    except (OSError, KeyError, ImportError):  # KeyError before Python 3.13; ImportError: Windows has no such list
        os.environ["LOGNAME"] = "nobody-by-name"  # where getpass looks first


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:  # no HOME, and a user id without a name
        return False
    return True


def _home_of_our_making() -> Path:
    """A folder of this user's among the temporary ones; one of its own where somebody else has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    home = Path(tempfile.gettempdir()) / f"qlora-{user}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
    except OSError:
        ours = False
    return home if ours else Path(tempfile.mkdtemp(prefix="qlora-"))
