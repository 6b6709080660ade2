"""HTML inside of Markdown."""

from __future__ import annotations

from qlora.data.documents.blocks import Block
from qlora.data.documents.tags import blocks_of_tags, text_of_tags


def test_what_readmes_open_with() -> None:
    markup = """<h1 align="center">Pump <img src="x.png"></h1><p align="center">A <b>warm</b><br>house</p>
    <script>var x = "<p>no</p>"</script><ul><li>one<li>two &amp; three</ul><div>unclosed"""
    assert blocks_of_tags(markup) == [
        Block("heading", "Pump", 1),
        Block("paragraph", "A warm\nhouse"),
        Block("item", "one", 1),
        Block("item", "two & three", 1),
        Block("paragraph", "unclosed"),
    ]
    assert (text_of_tags("<br/>"), text_of_tags("<b>")) == ("\n", "")


def test_tables_are_rows_and_layout_is_text() -> None:
    table = "<table><tr><th>Code<th>Means</tr><tr><td>E41</td><td>no <p>water</p></td></tr></table>after"
    assert blocks_of_tags(table) == [
        Block("table", rows=(("Code", "Means"), ("E41", "no water"))),
        Block("paragraph", "after"),
    ]
    assert blocks_of_tags("<table><tr><td>one</td></tr></table>") == [Block("paragraph", "one")]
    assert blocks_of_tags("<td>a</td></table></tr>") == [Block("paragraph", "a")]
