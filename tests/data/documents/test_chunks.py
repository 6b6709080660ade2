"""Documents to passages."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.documents.blocks import Block
from qlora.data.documents.chunks import Passage, passages, unique_passages
from qlora.data.documents.document import Document
from qlora.data.documents.markdown import markdown_blocks


def document(blocks: list[Block], language: str = "en", path: str = "a.md") -> Document:
    return Document(path, "0" * 64, 1, "pumps", language, tuple(blocks))


def count(text: str) -> int:
    """As a tokenizer counts, about: a token a word, and one more for each four letters of it."""
    return sum(1 + len(word) // 5 for word in text.split())


MANUAL = """\
# Manual

## Empty

## Error codes

| Code | Meaning |
| --- | --- |
| E41 | no water |
| E42 | too hot |

### E41

Open the valve. Then wait.

- one
- two
"""


def test_sections_with_their_path_and_units() -> None:
    found = passages(document(markdown_blocks(MANUAL)), count)
    assert [(passage.headings, passage.text, passage.sentences) for passage in found] == [
        (("Manual",), "Manual\n\nEmpty", ("Empty",)),
        (
            ("Manual", "Error codes"),
            "Manual › Error codes\n\nCode | Meaning\nE41 | no water\nE42 | too hot",
            ("Code: E41 | Meaning: no water", "Code: E42 | Meaning: too hot"),
        ),
        (
            ("Manual", "Error codes", "E41"),
            "Manual › Error codes › E41\n\nOpen the valve. Then wait.\n- one\n- two",
            ("Open the valve.", "Then wait.", "one", "two"),
        ),
    ]
    assert {(passage.document, passage.about, passage.language) for passage in found} == {("a.md", "pumps", "en")}


def test_a_long_table_repeats_its_header() -> None:
    rows = (("Code", "Meaning"), *((f"E{number}", f"meaning number {number}") for number in range(40)))
    found = passages(document([Block("heading", "Codes", 1), Block("table", rows=rows)]), count, limit=40)
    assert len(found) > 4
    for passage in found:
        assert passage.text.startswith("Codes\n\nCode | Meaning\nE") and count(passage.text) <= 40
    assert [sentence for passage in found for sentence in passage.sentences] == [
        f"Code: E{number} | Meaning: meaning number {number}" for number in range(40)
    ]


def test_what_is_longer_than_a_passage_is_parted_at_words_and_words_only_where_they_must() -> None:
    sentence = " ".join(f"word{number}" for number in range(90)) + "."
    found = passages(document([Block("paragraph", sentence)]), count, limit=30)
    assert " ".join(passage.text for passage in found) == sentence
    chinese = "水泵在地下室里，" * 40
    found = passages(document([Block("paragraph", chinese)], "zh"), len, limit=30)
    assert "".join(passage.text for passage in found) == chinese
    assert all(len(passage.text) <= 30 and passage.text.endswith("，") for passage in found)


def test_a_heading_too_long_for_a_path_is_text() -> None:
    found = passages(
        document([Block("heading", "very " * 20 + "long", 1), Block("paragraph", "text")]), count, limit=60
    )
    assert [passage.headings for passage in found] == [()] and "long" in found[0].text


WORD = st.text(alphabet="abcÄß水3.,|-#", min_size=1, max_size=14)
TEXT = st.lists(WORD, min_size=1, max_size=30).map(" ".join)
BLOCK = st.one_of(
    st.builds(Block, st.just("heading"), TEXT, st.integers(1, 6)),
    st.builds(Block, st.just("paragraph"), st.lists(TEXT, min_size=1, max_size=3).map("\n".join)),
    st.builds(Block, st.just("item"), TEXT, st.integers(1, 3)),
    st.builds(Block, st.just("code"), st.lists(TEXT, min_size=1, max_size=4).map("\n".join)),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5).map(lambda rows: Block("table", rows=tuple(rows))),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5).map(lambda rows: Block("table", rows=((), *rows))),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(BLOCK, max_size=9), st.integers(20, 90), st.sampled_from(["en", "de", "zh"]))
def test_every_word_stands_in_a_passage_and_none_is_too_long(blocks: list[Block], limit: int, language: str) -> None:
    found = passages(document(blocks, language), count, limit)
    words = {word for block in blocks for word in block.words()}
    assert words <= {word for passage in found for word in passage.text.split()}
    assert all(count(passage.text) <= limit and passage.sentences for passage in found)
    asked = {word for passage in found for sentence in passage.sentences for word in sentence.replace(":", "").split()}
    units = [block for block in blocks if block.kind in ("paragraph", "item", "code")]
    assert {word.replace(":", "") for block in units for word in block.words()} <= asked


def keys(found: list[Passage]) -> set[str]:
    return {passage.key for passage in found}


def test_a_change_changes_the_passages_around_it_alone() -> None:
    """A text of one section, in which nothing but the text itself says where to part it; six changes each alone."""
    chance = random.Random(3)
    parts = [" ".join(f"w{chance.randrange(900)}" for _ in range(chance.randrange(8, 40))) + "." for _ in range(150)]
    before = keys(passages(document([Block("paragraph", part) for part in parts]), count, 200))
    assert len(before) > 20
    changed = []
    for place in (0, 31, 64, 90, 120, 149):
        other = [*parts[:place], parts[place] + " Two more.", *parts[place + 1 :]]
        changed.append(len(keys(passages(document([Block("paragraph", part) for part in other]), count, 200)) - before))
    assert sum(changed) / len(changed) <= 4, changed
    moved = [*parts[75:80], *parts[:75], *parts[80:]]
    assert len(keys(passages(document([Block("paragraph", part) for part in moved]), count, 200)) - before) <= 8


def test_a_section_that_moves_to_another_file_keeps_its_keys() -> None:
    sections = [
        [Block("heading", f"Part {n}", 1), Block("paragraph", f"The pump {n} is warm. It hums.")] for n in range(6)
    ]
    one = document([block for section in sections for block in section])
    others = [
        document([block for section in sections[:2] for block in section], path="b.md"),
        document([block for section in reversed(sections[1:]) for block in section], path="c.pdf"),
    ]
    found, twice = unique_passages(others, count)
    assert keys(found) == keys(passages(one, count)) and twice == 1
    assert len(keys(found)) == 6 and found[0].document == "b.md"


@pytest.mark.parametrize("text", ["word " * 20_000, "a" * 100_000])
def test_a_text_without_an_end_is_counted_by_its_length(text: str) -> None:
    """Looking for what fits, no more than a few passages' text is counted for each passage."""
    counted = 0

    def count(piece: str) -> int:
        nonlocal counted
        counted += len(piece)
        return len(piece) // 4 + 1

    found = passages(document([Block("paragraph", text)]), count, 400)
    assert len(found) > 50 and counted < 40 * len(text)
