"""The picture of an estimate: what is wrong with its place is known before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.report import picture

GIB = 1 << 30


def test_a_picture_that_cannot_be_written_is_two_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="cannot be written"):
        picture.draw_lengths({512: GIB, 1024: 2 * GIB}, {"8 GB": 8 * GIB}, "a model", tmp_path / "none" / "peak.png")


@pytest.mark.parametrize("name", ["none/peak.png", "", "folder", "a\0b.png", "n" * 300 + ".png"])
def test_a_place_that_cannot_be_written_is_refused_early(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda _: "as if installed")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        picture.check_place(tmp_path / name)


def test_a_look_at_the_place_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "find_spec", lambda _: "as if installed")
    (tmp_path / "old.png").write_bytes(b"of before")
    for name in ("new.png", "old.png"):
        picture.check_place(tmp_path / name)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"of before"]
    monkeypatch.setattr(picture, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        picture.check_place(tmp_path / "new.png")
