"""How a page is judged: parsed, with its nesting, its addresses and its policy; and opened in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link"}
# Attributes that name an address, and what a page of ours may say there.
ADDRESSES = {
    "href",
    "src",
    "srcset",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "xlink:href",
    "cite",
    "ping",
}

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title></pre><iframe src=//evil>",
    "<!-- ]]> <![CDATA[",
    "\x1b]0;title\x07 \u202etxt.exe \x00 \r\n &lt; &#60;script&#62;",
    "<svg/onload=alert(1)>' javascript:alert(1)",
)


class Parsed(HTMLParser):
    """A page's elements and words. An end tag that ends something else fails, and so does an address to the outside."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.policy = ""
        self.feed(page)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        assert len(values) == len(attributes), f"{tag}: an attribute twice"
        for name, value in attributes:
            assert not name.startswith("on") and name != "style", f"{tag} {name}"
            assert name not in ADDRESSES or re.match(r"data:|#", value or ""), f"{tag} {name}={value}"
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open}"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def judged(page: str) -> Parsed:
    """Raises AssertionError for a page that is not well nested, reaches out, runs something, or allows it."""
    parsed = Parsed(page)
    assert not {"script", "iframe", "object", "embed", "a", "img", "form", "base"} & set(parsed.tags)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert "url(" not in style and "@import" not in style and "//" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert parsed.policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}'" in parsed.policy
    assert "unsafe" not in parsed.policy and "http" not in parsed.policy and "*" not in parsed.policy
    return parsed


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def opened(page: Path, folder: Path, width: int = 800, height: int = 900) -> str:
    """What Chromium logs as it draws a page without a network: errors, and what its console says."""
    command = [
        *(
            browser() or "",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--proxy-server=127.0.0.1:9",
        ),
        *(f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--disable-component-update"),
        *("--enable-logging=stderr", "--v=0"),
        *(f"--window-size={width},{height}", f"--screenshot={folder / 'page.png'}", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (folder / "page.png").stat().st_size > 5_000, done.stderr
    return done.stderr
