"""YAML of strangers: bounded, plain, unambiguous; what is not is refused with its line, and quickly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import foreign_yaml
from qlora.foreign_json import ForeignFileError

# Each alias stands for ten of the one before it: a billion values in 700 bytes.
BOMB = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 6))


def table(tmp_path: Path, text: str | bytes, name: str = "c.yml") -> dict[str, object]:
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return foreign_yaml.load_table(file, "c.yml")


def test_plain_configurations_are_read(tmp_path: Path) -> None:
    text = (
        "\ufeffbase_model: a/b\nlr: 2e-4\nx: {y: [1, true, null, 'no']}\nz:\ncommon: &c {a: 1}\nother: {<<: *c, b: 2}\n"
    )
    assert table(tmp_path, text) == {
        "base_model": "a/b",
        "lr": "2e-4",  # YAML 1.1 asks for a dot
        "x": {"y": [1, True, None, "no"]},
        "z": None,
        "common": {"a": 1},
        "other": {"a": 1, "b": 2},
    }
    assert table(tmp_path, '{"a": [1]}', "c.json") == {"a": [1]}
    assert table(tmp_path, "") == {} == table(tmp_path, "# nothing\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases stand for more than 5,000 values"),
        (MERGES, "aliases stand for more than 5,000 values"),
        ("a: &a [*a]", "stands for what it is a part of"),
        ("a: " + "[" * 2000, "line 1: is nested deeper than 16 levels"),
        (
            "a: !!python/object/apply:os.system ['touch x']",
            "line 1: a value has the tag 'tag:yaml.org,2002:python/object",
        ),
        ("a: !mine 1", "a value has the tag '!mine'"),
        ("a: !!binary aGk=", "a value has the tag"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ("x: {a: 1, a: 2}", "line 1: the key 'a' stands twice"),
        ("? [1, 2]\n: 3", "a key is no plain name"),
        ("a: 1\n---\nb: 2", "a second document begins"),
        ("- a\n- b", "holds no mapping"),
        ("just words", "holds no mapping"),
        ("a: [1, 2", "is not valid YAML"),
        ("a: 'x", "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: 2026-99-99", "is not valid YAML"),
        (b"a: \xff\xfe", "is not UTF-8"),
        ("a: \x07", "is not valid YAML"),
        ("a: x\n" * 16_000, "has more than 64,000 bytes"),
        ("[" + "1," * 12_000 + "1]", "holds more than 5,000 values"),
        ('{"a": 1, "a": 2}', "stands twice"),
    ],
)
def test_what_is_large_or_strange_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ForeignFileError, match=r"c\.yml") as error:
        table(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ForeignFileError, match="no regular file"):
            foreign_yaml.load_table(tmp_path / "pipe", "pipe")
    with pytest.raises(ForeignFileError):
        foreign_yaml.load_table(tmp_path, "folder")
