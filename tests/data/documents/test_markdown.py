"""Markdown to blocks."""

from __future__ import annotations

from qlora.data.documents.blocks import Block, finished
from qlora.data.documents.markdown import markdown_blocks

TEXT = """\
---
title: "Pumps of the house"
tags: [a, b]
---

## Install[^1]

Take [the *valve*](http://x.example/y "t") and ![a picture](p.png) the `key`.
It is\\
heavy. <span>In</span>line.

3. first
   second line

   | a | b |
   |---|---|
   | 1 | `2` |
4. next
   - deep

> quoted

```python
x = 1  # [^1]
```

    indented

<details><summary>More</summary>

inside

</details>

[^1]: A note of *several* words.

[link]: http://elsewhere.example "no text"
"""


def test_everything_that_stands_in_readmes() -> None:
    assert finished(markdown_blocks(TEXT)) == [
        Block("heading", "Pumps of the house", 1),
        Block("heading", "Install", 2),
        Block("paragraph", "Take the valve and the key. It is\nheavy. Inline."),
        Block("item", "3. first second line", 1),
        Block("table", rows=(("a", "b"), ("1", "2"))),
        Block("item", "4. next", 1),
        Block("item", "deep", 2),
        Block("paragraph", "quoted"),
        Block("code", "x = 1  # [^1]"),
        Block("code", "indented"),
        Block("paragraph", "More"),
        Block("paragraph", "inside"),
        Block("paragraph", "A note of several words."),
    ]


def test_a_heading_of_the_first_level_stands_for_the_title() -> None:
    blocks = markdown_blocks("+++\ntitle = 'x'\n+++\n# Own\n\ntext")
    assert blocks == [Block("heading", "Own", 1), Block("paragraph", "text")]


def test_lines_between_dashes_that_are_text_stay() -> None:
    assert len(markdown_blocks("---\n\nno front matter here\n\n---\n")) == 1
    assert markdown_blocks("a\n\n" + "> " * 40 + "deep")[-1] == Block("paragraph", "deep")
