"""Self-contained pages: a tree of elements that escapes by construction, in a frame with one style for light and dark.

A page opens from a mail or a USB stick: it loads nothing, sends nothing and runs nothing, and says so itself (its
content security policy allows its own style by hash, and else nothing). Text of strangers is text: it passes through
`shown`, then through `html.escape`, and there is no way to put markup into a page but by an element.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora import files, shown
from qlora.errors import UserError
from qlora.redaction import redact

_PHRASING = frozenset(("span", "code", "strong", "small"))
_FLOW = _PHRASING | {"section", "h1", "h2", "h3", "p", "div", "table", "ul", "details", "pre", "svg"}
_SHAPES = ("rect", "line", "polyline", "circle")
_DRAWN = frozenset(("g", "text", "title", *_SHAPES))
# What a page is made of, and which elements each may hold (HTML's content models, narrowed). `style`, `script`, `a`,
# `img` and whatever else could reach out are not among them.
CHILDREN = {
    **dict.fromkeys(("section", "div", "td", "li"), _FLOW),
    **dict.fromkeys(("h1", "h2", "h3", "p", "pre", "span", "code", "strong", "small", "summary", "th"), _PHRASING),
    "details": _FLOW | {"summary"},
    "table": frozenset(("thead", "tbody")),
    **dict.fromkeys(("thead", "tbody"), frozenset(("tr",))),
    "tr": frozenset(("th", "td")),
    "ul": frozenset(("li",)),
    **dict.fromkeys(("svg", "g"), _DRAWN),
    **dict.fromkeys(_SHAPES, frozenset(("title",))),
    **dict.fromkeys(("text", "title"), frozenset[str]()),
}
_WITHOUT_WORDS = frozenset(("table", "thead", "tbody", "tr", "ul", "svg", "g", *_SHAPES))
ATTRIBUTES = frozenset(
    (
        *("class", "id", "title", "role", "aria-label", "aria-hidden", "scope", "colspan", "open", "dir", "tabindex"),
        *("viewBox", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "text-anchor", "points", "cx", "cy", "r"),
    )
)


@dataclass(frozen=True)
class Element:
    """An element of a page; made by `element`, which checks it."""

    tag: str
    attributes: tuple[tuple[str, str], ...]
    children: tuple[Element | str, ...]

    def write(self, out: list[str]) -> None:
        """Append the element as HTML."""
        out.append(f"<{self.tag}")
        out += [f' {name}="{_escaped(value)}"' for name, value in self.attributes]
        out.append(">")
        for child in self.children:
            if isinstance(child, Element):
                child.write(out)
            else:
                out.append(_escaped(child))
        out.append(f"</{self.tag}>")


def element(tag: str, *children: Element | str, attributes: Mapping[str, str | int | float] | None = None) -> Element:
    """An element with text and elements in it. Raises ValueError for what no page may hold, or may not hold there."""
    values = tuple((name, str(value)) for name, value in (attributes or {}).items())
    if tag not in CHILDREN or any(name not in ATTRIBUTES for name, _ in values):
        raise ValueError(f"<{tag}> with {[name for name, _ in values]} is nothing that a page may hold")
    for child in children:
        if isinstance(child, Element) and child.tag not in CHILDREN[tag]:
            raise ValueError(f"<{tag}> holds no <{child.tag}>")
        if isinstance(child, str) and tag in _WITHOUT_WORDS:
            raise ValueError(f"<{tag}> holds no words")
    return Element(tag, values, children)


def classed(tag: str, name: str, *children: Element | str, **attributes: str | int | float) -> Element:
    """An element of a class, or of several. `aria_label` stands for aria-label."""
    named = {key.replace("_", "-"): value for key, value in attributes.items()}
    return element(tag, *children, attributes={"class": name, **named})


def table(heads: Sequence[str], rows: Sequence[Sequence[Element | str]]) -> Element:
    """A table that scrolls by itself where it is wider than the screen. Cells that are figures stand to the right."""
    head = element("tr", *(element("th", name, attributes={"scope": "col"}) for name in heads))
    body = [element("tr", *(_cell(cell) for cell in row)) for row in rows]
    made = element("table", element("thead", head), element("tbody", *body))
    return classed("div", "wide", made, tabindex=0)


def card(figure: str, what: str) -> Element:
    """A figure with what it counts below it, for a row of them (class "cards")."""
    return classed("div", "card", element("strong", figure), element("small", what))


def _cell(value: Element | str) -> Element:
    is_figure = isinstance(value, str) and re.fullmatch(r"[\d,.]+( ?%)?", value) is not None
    return classed("td", "figure", value) if is_figure else element("td", value)


STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def page(title: str, *sections: Element, refresh_seconds: int | None = None) -> str:
    """The whole page, with its frame. `title` is a stranger's text as any other.

    `refresh_seconds`: how often a browser is to open the same file again, for a page of something under way.
    """
    body: list[str] = []
    for section in sections:
        section.write(body)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    again = "" if refresh_seconds is None else f'<meta http-equiv="refresh" content="{refresh_seconds}">\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'{again}<link rel="icon" href="data:,">\n<title>{_escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(shown.block(redact(text)))


MARK = b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy"'


def check_place(file: Path, what: str = "`html`") -> Path:
    """Before anything is computed: where a page named so by the user can be written. `what` names it in errors.

    Raises UserError for a link, and for what is there and is no page of ours.
    """
    files.user_path(file, what)
    file = file.expanduser().absolute()
    try:
        if files.is_link(file):
            raise files.UnsafePathError("a link, and nothing is written through one")
        if not file.parent.is_dir():
            raise UserError(f"{what}: {file.parent}: no such folder", "make it, or name a file in another one")
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not file.exists():
            return file
        with files.open_to_read(file) as there:
            ours = there.read(len(MARK)) == MARK
    except (OSError, files.UnsafePathError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: {file}: {reason}", "name another file") from error
    if not ours:
        raise UserError(f"{what}: {file} is there, and is no page of ours", "name another file, or remove it")
    return file
