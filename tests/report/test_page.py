"""Pages load nothing, run nothing and nest well, whatever strangers write; a browser agrees."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.report import page
from qlora.report.page import check_place, classed, element, table
from tests.report.pages import ATTACKS, browser, judged, opened


def test_text_of_strangers_is_text() -> None:
    cells = [[attack, element("code", attack)] for attack in ATTACKS]
    parts = [classed("p", "dim", attack, title=attack) for attack in ATTACKS]
    made = page.page(ATTACKS[2], element("section", *parts, table(("a", ATTACKS[0]), cells)))
    parsed = judged(made)
    assert set(parsed.tags) <= {
        *("html", "head", "meta", "link", "title", "style", "body", "main", "section"),
        *("p", "div", "table", "thead", "tbody", "tr", "th", "td", "code"),
    }
    assert parsed.text.count("<script>alert(1)</script>") == 4 and "&lt; &#60;script" in parsed.text
    assert not {"\x1b", "\u202e", "\x00", "\r"} & set(made) and "\u241b" in made


def test_secrets_of_texts_stay_out() -> None:
    token = "hf_" + "a1B2" * 9
    assert token not in page.page("t", element("p", f"token {token}"))


@pytest.mark.parametrize(
    ("tag", "inner"),
    [("p", "div"), ("p", "p"), ("table", "tr"), ("tr", "p"), ("ul", "p"), ("span", "p"), ("svg", "div"), ("text", "g")],
)
def test_wrong_nesting_cannot_be_made(tag: str, inner: str) -> None:
    with pytest.raises(ValueError, match=f"<{tag}> holds no <{inner}>"):
        element(tag, element(inner))


def test_what_reaches_out_cannot_be_made() -> None:
    for tag in ("script", "a", "img", "iframe", "style", "link", "form", "object"):
        with pytest.raises(ValueError, match="nothing that a page may hold"):
            element(tag)
    for name in ("href", "src", "style", "onclick"):
        with pytest.raises(ValueError, match="nothing that a page may hold"):
            element("p", attributes={name: "x"})
    with pytest.raises(ValueError, match="holds no words"):
        element("tr", "words")


def test_only_pages_of_ours_are_replaced(tmp_path: Path) -> None:
    new, ours, other, link = (tmp_path / name for name in ("new.html", "ours.html", "other.html", "link.html"))
    ours.write_text(page.page("t", element("p", "x")))
    other.write_text("<!DOCTYPE html>\n<html>mine</html>")
    link.symlink_to(ours)
    assert check_place(new) == new and check_place(ours) == ours
    for place, why in ((other, "no page of ours"), (link, "a link"), (tmp_path, "not a regular file")):
        with pytest.raises(UserError, match=why):
            check_place(place)
    with pytest.raises(UserError, match="no such folder"):
        check_place(tmp_path / "none" / "a.html")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="there is no Chromium here")
def test_a_browser_asks_for_nothing(tmp_path: Path) -> None:
    """A server that waits for whoever is lured to it; nobody comes, and the console is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        lure = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        attacks = (*ATTACKS, f"<img src='{lure}'>", f"</style><style>@import '{lure}';</style>", f"<link href={lure}>")
        parts = [classed("p", "dim", attack, title=attack) for attack in attacks]
        (tmp_path / "a.html").write_text(page.page("t", element("section", *parts)))
        said = opened(tmp_path / "a.html", tmp_path)
        assert "CONSOLE" not in said, said
        with pytest.raises(TimeoutError):
            server.accept()
