"""The zip archives that DOCX and EPUB are: opened within bounds of what they may become.

The sizes that an archive states are what Python's zipfile reads at most, so that their sum is known before a byte is
unpacked. Archives inside of it are not opened at all.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence

from qlora.data.documents.parsed import NotReadable

MAX_MEMBERS = 20_000
MAX_UNPACKED = 256 << 20  # bytes of all texts in it together: pictures are not unpacked
MAX_RATIO = 300  # of one text to what it takes in the file; usual texts are 3 to 30 times smaller
SMALL = 1 << 20  # bytes: below it the ratio says nothing
_UNUSUAL = "no usual file is like that: do not trust it, or save it anew from its source"
_OLE = b"\xd0\xcf\x11\xe0"  # how a file of Word 97 begins, and one of today's with a password
_TEXTS = (".xml", ".rels", ".xhtml", ".html", ".htm", ".opf", ".ncx")


def opened(data: bytes, kind: str) -> zipfile.ZipFile:
    """The archive. Raises NotReadable where it is none, is encrypted, or would become too much."""
    if data.startswith(_OLE):
        raise NotReadable(f"not a {kind} but a file of Word 97, or one with a password", f"save it anew as {kind}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise NotReadable(f"not a readable {kind} ({str(error)[:100]})", "save it anew from its source") from None
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise NotReadable(f"an archive of {len(members):,} files (at most {MAX_MEMBERS:,})", _UNUSUAL)
    texts = [member for member in members if member.filename.lower().endswith(_TEXTS)]
    check_sizes(texts)
    if any(member.flag_bits & 1 for member in texts):
        raise NotReadable(f"the {kind} is encrypted", "save a copy without a password")
    return archive


def check_sizes(members: Sequence[zipfile.ZipInfo]) -> None:
    """Raises NotReadable where files that are going to be unpacked would become too much."""
    size = sum(member.file_size for member in members)
    if size > MAX_UNPACKED:
        raise NotReadable(f"its text unpacks to {size:,} bytes (at most {MAX_UNPACKED:,})", _UNUSUAL)
    for member in members:
        if member.file_size > SMALL and member.file_size > MAX_RATIO * max(member.compress_size, 1):
            what = f"a part of it unpacks to {member.file_size // max(member.compress_size, 1):,} times its size"
            raise NotReadable(what, _UNUSUAL)


def named(archive: zipfile.ZipFile, names: Sequence[str]) -> list[zipfile.ZipInfo]:
    """Those of the names that stand in it, whatever they end in: a stranger's index may call a text anything."""
    there = {member.filename: member for member in archive.infolist()}
    return [there[name] for name in dict.fromkeys(names) if name in there]


def texts_alone(archive: zipfile.ZipFile) -> bytes:
    """The archive with its texts alone, for a library that reads whatever its own index names: what is no text by its
    name (a picture, sound, or what only pretends to be one) is neither bounded nor looked into."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as written:
        for one in archive.infolist():
            if one.filename.lower().endswith(_TEXTS):
                written.writestr(one.filename, member(archive, one.filename) or b"")
    return made.getvalue()


def member(archive: zipfile.ZipFile, name: str) -> bytes | None:
    """A file's bytes; None where there is none of that name. Raises NotReadable where it cannot be unpacked."""
    try:
        return archive.read(name)
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise NotReadable(f"a part of it cannot be unpacked ({str(error)[:100]})", "save it anew") from None
