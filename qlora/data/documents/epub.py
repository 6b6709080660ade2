"""EPUB: a zip of XHTML files, read in the order of the book's spine; each goes through the one walk of `html.py`.

The package's own XML is read by the HTML parser too, which expands no entity that a file declares.
"""

from __future__ import annotations

import posixpath
import zipfile
from typing import Any
from urllib.parse import unquote

from qlora.data.documents.archives import check_sizes, member, named, opened
from qlora.data.documents.blocks import Block
from qlora.data.documents.decoding import decoded
from qlora.data.documents.html import BOILERPLATE, soup, walked
from qlora.data.documents.parsed import NotReadable, Parsed

_PAGES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
_BROKEN = "make it anew, or convert it to .html"


def parse(data: bytes) -> Parsed:
    """Blocks of a book. Raises NotReadable for one that is broken, or protected against being read."""
    archive = opened(data, "EPUB")
    names = _spine(archive)
    check_sizes(named(archive, names))
    locked = _locked(archive) & set(names)
    if locked:
        raise NotReadable("the EPUB is protected (DRM)", "use a copy without protection")
    blocks: list[Block] = []
    left_out = missing = 0
    for name in names:
        page = member(archive, name)
        if page is None:
            missing += 1
            continue
        found, words = walked(soup(decoded(page, is_html=True)[0]))
        blocks += found
        left_out += words
    told = (("chapters that the book names and does not hold", missing), (BOILERPLATE, left_out))
    return Parsed(blocks, left_out=tuple(item for item in told if item[1]))


def _spine(archive: zipfile.ZipFile) -> list[str]:
    """Names of the book's pages in reading order (EPUB 3.3, 5.7: the spine), without its table of contents."""
    container = _soup(archive, "META-INF/container.xml")
    root = container.find("rootfile")
    place = str(root.get("full-path", "")) if root else ""
    package = _soup(archive, place)
    folder = posixpath.dirname(place)
    items: dict[str, str] = {}
    for item in package.find_all(lambda tag: tag.name.rpartition(":")[2] == "item"):
        wanted = item.get("media-type") in _PAGES and "nav" not in str(item.get("properties", "")).split()
        if wanted and item.get("id") and item.get("href"):
            name = posixpath.normpath(posixpath.join(folder, unquote(str(item["href"]).partition("#")[0])))
            items[str(item["id"])] = name
    order = package.find_all(lambda tag: tag.name.rpartition(":")[2] == "itemref")
    return list(dict.fromkeys(items[str(ref.get("idref"))] for ref in order if str(ref.get("idref")) in items))


def _soup(archive: zipfile.ZipFile, name: str) -> Any:
    check_sizes(named(archive, [name]))
    data = member(archive, name) if name else None
    if data is None:
        raise NotReadable("not an EPUB: its list of contents is missing", _BROKEN)
    return soup(decoded(data, is_html=True)[0])


def _locked(archive: zipfile.ZipFile) -> set[str]:
    """Names of the files that are encrypted; fonts alone often are."""
    if "META-INF/encryption.xml" not in archive.namelist():
        return set()
    found = _soup(archive, "META-INF/encryption.xml").find_all(lambda tag: tag.name.endswith("cipherreference"))
    return {posixpath.normpath(unquote(str(reference.get("uri", "")))) for reference in found}
