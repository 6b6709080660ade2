"""HTML to blocks."""

from __future__ import annotations

import pytest

from qlora.data.documents.blocks import Block, finished
from qlora.data.documents.html import parse


def blocks(markup: str) -> list[Block]:
    return finished(parse(markup.encode()).blocks)


def test_the_text_of_a_page_and_nothing_around_it() -> None:
    page = """<!doctype html><html><head><title>Site</title><style>p{}</style></head><body>
    <header><h1>Pump&nbsp;manual</h1><a>Log in</a></header><nav><ul><li>Home</li></ul></nav>
    <div role="navigation">crumbs</div><div hidden>h</div><div style="DISPLAY : none">n</div><noscript>js</noscript>
    <main><aside class="note">Mind the gap.</aside><p>A<b>B</b> c<br>d<!-- no --></p><button>Buy</button></main>
    <aside>Related</aside><footer>All rights</footer><script>let p = "<p>x</p>"</script></body></html>"""
    parsed = parse(page.encode())
    assert finished(parsed.blocks) == [
        Block("heading", "Pump manual", 1),
        Block("paragraph", "Mind the gap."),
        Block("paragraph", "AB c\nd"),
    ]
    # "Log in", Home, crumbs, Related, "All rights"
    assert parsed.left_out == (("words of navigation, page header, footer and aside", 7),)


def test_a_title_stands_where_no_heading_of_the_first_level_does() -> None:
    assert blocks("<title>T</title><h2>a</h2>")[0] == Block("heading", "T", 1)
    assert blocks("<title>T</title><h1>a</h1>")[0] == Block("heading", "a", 1)


def test_lists_definitions_code_and_raised_numbers() -> None:
    page = """<ol start=3><li>a<ul><li><p>b</p><p>more</ul><li value=9>c</ol>
    <dl><dt>Term<dd>what it <i>means</i><dt>Other</dt><dd><ul><li>x</ul></dd></dl>
    <pre>  one
    two</pre><p>5 m<sup>2</sup> H<sub>2</sub>O<sup><a href="#1">1</a></sup></p><h2>Head<a>¶</a></h2>"""
    assert blocks(page) == [
        Block("item", "3. a", 1),
        Block("item", "b", 2),
        Block("paragraph", "more"),
        Block("item", "9. c", 1),
        Block("item", "Term: what it means", 1),
        Block("item", "Other", 1),
        Block("item", "x", 1),
        Block("code", "  one\n    two"),
        Block("paragraph", "5 m² H2O"),
        Block("heading", "Head", 2),
    ]


@pytest.mark.parametrize(
    ("markup", "rows"),
    [
        ("<tr><th>a<th>b<tr><td>1<td>2", (("a", "b"), ("1", "2"))),
        ("<thead><tr><td>a<td>5</thead><tr><td>1<td>2", (("a", "5"), ("1", "2"))),
        ("<tr><td>Code<td>Means<tr><td>E41<td>x", (("Code", "Means"), ("E41", "x"))),
        ("<tr><th>Weight<td>5 kg<tr><th>Height<td>1 m", ((), ("Weight", "5 kg"), ("Height", "1 m"))),
        ("<tr><td rowspan=2>5<td>a<tr><td>b", ((), ("5", "a"), ("5", "b"))),
        ("<tr><td colspan=2>5<tr><td>a<td>b", ((), ("5", ""), ("a", "b"))),
        ("<tr><td>1<td><p>a</p><p>b</p>", ((), ("1", "a b"))),
        ("<tr><td>1<td rowspan=99999>x<tr><td>2", ((), ("1", "x"), ("2", "x"))),
    ],
)
def test_tables_as_rows(markup: str, rows: tuple[tuple[str, ...], ...]) -> None:
    assert blocks(f"<table>{markup}</table>") == [Block("table", rows=rows)]


def test_a_table_that_lays_out_a_page_is_text() -> None:
    page = "<table><tr><td><h1>A</h1>text<td><table><tr><td>x<td>1<tr><td>y<td>2</table></table>"
    assert blocks(page) == [
        Block("heading", "A", 1), Block("paragraph", "text"), Block("table", rows=((), ("x", "1"), ("y", "2"))),
    ]  # fmt: skip


def test_two_breaks_are_a_new_paragraph_and_unclosed_tags_lose_nothing() -> None:
    assert [block.text for block in blocks("a<br><br>b<p>c<div>d<li>e<h1>f")] == ["a", "b", "c", "d", "e", "f"]
    deep = blocks("<div>" * 400 + "deep <b>words</b>")
    assert deep[0].words() == ["deep", "words"]
