"""DOCX by mammoth: its HTML goes through the one walk of `html.py`. Macros are never run, and not even read."""

from __future__ import annotations

import io
from typing import Any

from qlora.data.documents.archives import member, opened, texts_alone
from qlora.data.documents.blocks import Block
from qlora.data.documents.html import soup, walked
from qlora.data.documents.parsed import NotReadable, Parsed

# Word's own names of styles that mammoth has no rule for. A title stands above the headings: h1, and they below it.
_STYLES = """
p[style-name='Title'] => h1.title:fresh
p[style-name='Subtitle'] => p:fresh
p[style-name='Code'] => pre:separator('\\n')
p[style-name='Source Code'] => pre:separator('\\n')
p[style-name='HTML Preformatted'] => pre:separator('\\n')
p[style-name='Macro Text'] => pre:separator('\\n')
p[style-name='List Paragraph'] => p:fresh
"""
MACROS = "macros, which are never run"


def parse(data: bytes) -> Parsed:
    """Blocks of a Word document. Raises NotReadable for one that is broken or encrypted, or becomes too much."""
    import mammoth

    archive = opened(data, "DOCX")
    names = archive.namelist()
    for name in names:
        # No file of Word's declares entities; in one that does they are meant to become gigabytes.
        if name.lower().endswith((".xml", ".rels")) and _declares(member(archive, name) or b""):
            raise NotReadable("its XML declares entities", "do not trust it, or save it anew from its source")
    macros = sum(name.lower().endswith("vbaproject.bin") for name in names)
    pictures: Any = mammoth.images.img_element(_no_picture)
    try:
        page = mammoth.convert_to_html(
            io.BytesIO(texts_alone(archive)),
            style_map=_STYLES,
            convert_image=pictures,
            include_embedded_style_map=False,
        ).value
    except (KeyError, OSError):
        raise NotReadable("not a DOCX: there is no document in it", "save it anew from Word as .docx") from None
    blocks, _ = walked(soup(page))
    if 'class="title"' in page:
        blocks = _below_title(blocks)
    return Parsed(blocks, left_out=((MACROS, macros),) if macros else ())


def _declares(xml: bytes) -> bool:
    return b"<!ENTITY" in xml or b"<!DOCTYPE" in xml or "<!ENTITY".encode("utf-16-le") in xml


def _no_picture(_: Any) -> dict[str, str]:
    return {}


def _below_title(blocks: list[Block]) -> list[Block]:
    """The title at level 1 and every other heading a level lower."""
    first = next((number for number, block in enumerate(blocks) if block.kind == "heading"), 0)
    return [
        Block("heading", block.text, block.level + 1) if block.kind == "heading" and number > first else block
        for number, block in enumerate(blocks)
    ]
