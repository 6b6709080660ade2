"""JSON of strangers: bounded, and wrong values named with their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import foreign_json
from qlora.foreign_json import ForeignFileError, ForeignModel


class Config(ForeignModel):
    r: int
    name: str = ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("1" * 10_000, "10,000 digits"),
        ("1e999", "too large"),
        ("[" + "[]," * 3_000_000 + "1]", "more than 4,000,000 values"),
        ('{"a": "\xff"', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ForeignFileError, match=reason) as error:
        foreign_json.load(file)
    assert str(error.value).startswith(str(file)) and len(str(error.value)) < 300 + len(str(file))


def test_what_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[" * 64 + "]" * 64)
    foreign_json.load(file)
    with pytest.raises(ForeignFileError, match="no JSON object"):
        foreign_json.load_object(file)
    with pytest.raises(ForeignFileError, match=r"^here: holds no JSON object"):
        foreign_json.load_object(file, shown=Path("here"))
    # transformers' length of a tokenizer without a limit, and what Mamba's configurations hold
    assert foreign_json.parse('{"a": 1000000000000000019884624838656, "b": [0.0, Infinity]}', "x")["b"][1] > 1
    with pytest.raises(ForeignFileError, match="too many"):
        foreign_json.load(file, 100)
    with pytest.raises(ForeignFileError, match="cannot be read"):
        foreign_json.load(tmp_path / "none.json")


def test_a_wrong_value_is_named_with_its_key() -> None:
    assert foreign_json.checked(Config, {"r": 8, "more": 1}, "x").r == 8
    for value, reason in (
        ({"r": "8" * 100}, "x: r is wrong: Input should be a valid integer \\(it is '888+…\\)"),
        ({}, "x: r is wrong: Field required$"),
        ([], "x: the value is wrong: Input should be a JSON object$"),
        ({"r": 1, "name": 3}, "x: name is wrong"),
        ({"r": True}, "x: r is wrong"),
    ):
        with pytest.raises(ForeignFileError, match=reason):
            foreign_json.checked(Config, value, "x")
