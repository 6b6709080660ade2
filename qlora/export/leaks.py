"""What must not leave this machine with a model: its folders, the names of user and machine, addresses, tokens.

Three kinds of search, by whose text it is. In every file, weights included, the known ones are looked for as bytes:
secrets, the owner's mail addresses, the folders that the work lies in. In a text of the base or of its tokenizer, what
looks like a home folder too. Texts that we wrote are cleaned instead: of every path its last part stays, the rest
becomes an ellipsis.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from qlora import files
from qlora.redaction import SHORTEST, redact, values

BLOCK_BYTES = 4 << 20
MAX_GIT_BYTES = 1 << 16  # of a file of git's settings
GONE = "…"
_LEAST_WORD = 4  # letters of a name that is looked for as a word
# Names of accounts and machines that are words: to take them out of a text would take out the word.
_ORDINARY = {
    *("root", "user", "users", "admin", "administrator", "ubuntu", "debian", "runner", "guest", "test", "tester"),
    *("home", "work", "docker", "node", "host", "server", "localhost", "local", "laptop", "desktop", "computer"),
    *("data", "model", "models", "train", "training", "owner", "base", "adapter", "machine"),
}
MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b")
# A path of two parts or more, from a root, a drive or a home on; what follows a colon and two slashes is an address.
_PATH = re.compile(
    r"(?:(?<![\w./\\:~<-])|(?<=file://))(?:[A-Za-z]:[\\/]+|~[\w.-]*/|/)[\w.@+~-]+(?:[\\/]+[\w.@+~-]+)+[\\/]*"
)
# A whole value that is a path, which may have blanks in it.
_WHOLE_PATH = re.compile(r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)[^\n]*[\\/]?[^\n]+")
_HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[\w.@+-]+[\\/]+[\w.@+-]")
_GIT_MAIL = re.compile(r"(?im)^\s*email\s*=\s*\"?([^\s\"]+@[^\s\"]+)")


@dataclass(frozen=True)
class Found:
    """What was found, in words, and where: its first byte."""

    what: str
    at: int


@dataclass(frozen=True)
class Private:
    """`needles`: texts that no file may hold, with what each of them is. `words`: names of the user and the machine."""

    needles: Mapping[str, str]
    words: tuple[str, ...]

    @classmethod
    def of_owner(cls, folders: Iterable[Path], mails: Iterable[str], spared: Iterable[str], token: str = "") -> Private:
        """Of this user. `folders` are those that the work lies in, `mails` the owner's addresses as the hub knows
        them, `token` the hub's; a name that is part of one of `spared` (the repository's and the base's) stays.
        """
        home = _home()
        places = [*home, *(form for folder in folders for form in (str(folder), os.path.realpath(folder)))]
        # One part, such as /root or /tmp, is a word of many vocabularies.
        needles = {place: "a folder of this machine" for place in places if len(PurePath(place).parts) > 2}
        needles |= {mail: "a mail address of yours" for mail in (*mails, *_mails()) if len(mail) >= SHORTEST}
        needles |= dict.fromkeys([*values(), *([token] if token else [])], "a token or password")
        public = " ".join(spared).lower()
        names = {name for name in _names(home) if len(name) >= _LEAST_WORD and name.lower() not in _ORDINARY}
        words = sorted((name for name in names if name.lower() not in public), key=len, reverse=True)
        return cls(needles, tuple(words))

    def clean(self, text: str) -> str:
        """A text that we wrote, without any of it: what a hint of this machine was is an ellipsis."""
        text = redact(text)
        for needle in sorted(self.needles, key=len, reverse=True):
            text = text.replace(f"{needle}{os.sep}", "").replace(needle, GONE)
        text = MAIL.sub(GONE, _PATH.sub(lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], text))
        for word in self.words:
            text = re.sub(rf"(?i)(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", GONE, text)
        return text

    def clean_values(self, value: Any) -> Any:
        """A value of plain types with every text in it cleaned; what names a base by its folder keeps the last part."""
        if isinstance(value, dict):
            return {self.clean(key): self.clean_values(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.clean_values(inner) for inner in value]
        if not isinstance(value, str):
            return value
        is_path = _WHOLE_PATH.fullmatch(value) and len(re.split(r"[\\/]+", value.strip("\\/"))) > 1
        return self.clean(re.split(r"[\\/]+", value.rstrip("\\/"))[-1] if is_path else value)

    def in_text(self, text: str, homes_too: bool = True, mails_too: bool = False) -> Found | None:
        """What a text of others holds of it; with `homes_too` of home folders, with `mails_too` of addresses."""
        for needle, what in self.needles.items():
            if (at := text.find(needle)) >= 0:
                return Found(what, at)
        if redact(text) != text:
            return Found("what looks like a token or password", _first_difference(text, redact(text)))
        if homes_too and (home := _HOME.search(text)) is not None:
            return Found("a home folder", home.start())
        if mails_too and (mail := MAIL.search(text)) is not None:
            return Found("a mail address", mail.start())
        return None

    def scan(self, blocks: Iterable[bytes]) -> tuple[str, int, Found | None]:
        """Of a file's bytes: sha256, size, and the first needle in them."""
        forms = {form: what for needle, what in self.needles.items() for form in _forms(needle)}
        # A folder inside one that is looked for is found with it: of 30 a handful are left to be looked for.
        needles = {form: what for form, what in forms.items() if not any(one in form and one != form for one in forms)}
        overlap = max(map(len, needles), default=1) - 1
        digest, size, tail, found = hashlib.sha256(), 0, b"", None
        for block in blocks:
            digest.update(block)
            if found is None:
                window = tail + block
                hits = [
                    Found(what, size - len(tail) + window.find(form))
                    for form, what in needles.items()
                    if form in window
                ]
                found = min(hits, key=lambda hit: hit.at, default=None)
                tail = window[-overlap:] if overlap else b""
            size += len(block)
        return digest.hexdigest(), size, found


def line_of(text: str, at: int) -> int:
    """The number of the line that holds the character `at`."""
    return text.count("\n", 0, at) + 1


def _forms(needle: str) -> Iterator[bytes]:
    """As it may stand in a file: plain, as JSON writes it with and without letters beyond ASCII and with its slashes
    escaped, as an address has it, and in UTF-16."""
    for text in dict.fromkeys((needle, needle.replace("\\", "/"))):
        plain = text.encode("utf-8", "surrogateescape")
        yield plain
        for safe in ("/", "/:", ""):
            quoted = quote(plain, safe)
            yield quoted.encode()
            yield re.sub("%..", lambda sign: sign[0].lower(), quoted).encode()
        with suppress(UnicodeEncodeError):
            for ascii_only in (True, False):
                written = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
                yield written.encode()
                yield written.replace("/", "\\/").encode()
            yield text.encode("utf-16-le")
            yield text.encode("utf-16-be")


def _home() -> list[str]:
    found = [os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")]
    with suppress(RuntimeError):
        found.append(str(Path.home()))
    return [place for place in found if place]


def _names(homes: Iterable[str]) -> Iterator[str]:
    yield from (platform.node(), platform.node().partition(".")[0])
    yield from (Path(home).name for home in homes)
    yield from (os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME"))
    with suppress(OSError, KeyError, ImportError):  # a user id without a name; Windows has no such list
        yield getpass.getuser()


def _mails() -> Iterator[str]:
    """Addresses that git puts into commits, and what mail programs take."""
    for name in ("EMAIL", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        yield os.environ.get(name, "")
    places = [Path(home) / ".gitconfig" for home in _home()]
    places += [Path(home) / ".config" / "git" / "config" for home in _home()]
    for place in places:
        with suppress(OSError, files.UnsafePathError, ValueError):
            text = files.read_bytes(Path(os.path.realpath(place)), MAX_GIT_BYTES).decode("utf-8", "replace")
            yield from _GIT_MAIL.findall(text)


def _first_difference(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
