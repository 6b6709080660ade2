"""TOML of strangers: what could become large is refused before the parser sees it, and said with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import foreign_toml
from qlora.foreign_toml import ForeignTomlError, parse

REFUSED = {
    "dotted keys": ("a = 1\n" + ".".join("a" * 100_000) + " = 1", "more than 16 parts", 2),
    "dotted keys with spaces and quotes": (" . ".join(['"a.b"', "'c d'", "e"] * 20) + " = 1", "more than 16 parts", 1),
    "dotted keys in a table": ("x = { " + ".".join("a" * 30) + " = 1 }", "more than 16 parts", 1),
    "a dotted header": ("[" + ".".join("a" * 30) + "]", "more than 16 parts", 1),
    "dotted keys behind a quote in a quote": ("x = { a = '\"', " + ".".join("a" * 30) + " = '\"' }", "16 parts", 1),
    "dotted keys behind a long string": ('x = """\n"\n"""\n' + ".".join("a" * 30) + " = 1", "16 parts", 4),
    "arrays": ("a = " + "[" * 10_000, "nested deeper", None),
    "arrays that end": ("a = " + "[" * 20 + "]" * 20, "nested deeper", None),
    "tables in tables": ("a = " + "{a=" * 5_000, "nested deeper", None),
    "a number of 10,000 digits": ("\na = " + "1" * 10_000, "of more than 200 characters", 2),
    "a number in pieces": ("a = " + "1_" * 5_000 + "1", "of more than 200 characters", 1),
    "a hexadecimal number": ("a = 0x" + "f" * 100_000, "of more than 200 characters", 1),
    "a bare key": ("a" * 500_000 + " = 1", "of more than 200 characters", 1),
    "a long string as a key, twice": (('"' + "a" * 500_000 + '" = 1\n') * 2, "overwrite|twice", None),
    "a date that is none": ("a = 1979-13-45", "expected newline", 1),
    "a key twice": ("a = 1\na = 2", "overwrite", None),
    "half a string": ('a = "x', "expected|unterminated|illegal", None),
    "NUL": ('a = "\0"', "illegal character", 1),
    "quotes without an end": ('a = "' + '\\"' * 100_000, "expected|unterminated", None),
    "fences without an end": ('a = """' + '\\"""' * 50_000, "expected|unterminated", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    text, reason, line = REFUSED[name]
    with pytest.raises(ForeignTomlError, match=f"(?i){reason}") as error:
        parse(text)
    assert line is None or error.value.line == line
    assert len(str(error.value)) <= 300


def test_what_is_read() -> None:
    """Dots and long words in strings and comments are text."""
    words = ".".join("a" * 100) + "x" * 500
    table = parse(f"# {words}\na = \"{words}\" # {words}\nb = '''\n{words}\n'''\n[c.d]\ne = ['{words}']\n")
    assert table == {"a": words, "b": words + "\n", "c": {"d": {"e": [words]}}}
    assert parse("a = " + "[" * 15 + "]" * 15)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r")
    assert foreign_toml.read_text(file) == "a = 1\nb = 2\n"
    (tmp_path / "link.toml").symlink_to(file)
    assert foreign_toml.read_text(tmp_path / "link.toml")
    file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(ForeignTomlError, match="more than 1,000,000 bytes"):
        foreign_toml.read_text(file)
    with pytest.raises(FileNotFoundError):
        foreign_toml.read_text(tmp_path / "none.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    for name, reason in (
        ("pipe.toml", "not a regular file"),
        ("zero.toml", "not a regular file"),
        ("", "is a folder"),
        ("loop.toml", "levels of symbolic links"),
        ("x" * 300, "name too long"),
        ("a\0b", "NUL"),
    ):
        with pytest.raises(ForeignTomlError, match=f"(?i){reason}"):
            foreign_toml.read_text(tmp_path / name)


def test_names_beside_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"a{number:02}.toml").touch()
    (tmp_path / "quickstart.toml").touch()
    near = foreign_toml.beside(tmp_path / "quikstart.toml")
    assert near[0] == "quickstart.toml" and len(near) == 5
    assert foreign_toml.beside(tmp_path / "none" / "x.toml") == foreign_toml.beside(tmp_path / "a00.toml" / "x") == []
