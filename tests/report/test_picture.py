"""The picture of an estimate: what is wrong with its place is known before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.errors import UserError
from qlora.report import picture

GIB = 1 << 30


def test_a_picture_that_cannot_be_written_is_two_lines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peaks = {512: (GIB, GIB // 8), 1024: (2 * GIB, GIB // 4)}
    with pytest.raises(UserError, match="cannot be written"):
        picture.draw_lengths(peaks, ("a card", 3 * GIB), {"8 GB": 8 * GIB}, "a model", tmp_path / "none" / "peak.png")


def test_the_picture_has_the_peak_its_margin_and_the_limit_that_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    kept: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    peaks = {512: (GIB, GIB // 8), 1024: (2 * GIB, GIB // 4)}
    picture.draw_lengths(peaks, ("$asked$", 3 * GIB), {"8 GB": 8 * GIB}, "a model", tmp_path / "peak.png")
    (axes,) = kept[0].axes
    peak, *limits = [list(line.get_ydata()) for line in axes.lines]
    assert peak == [1, 2] and limits == [[8, 8], [3, 3]]
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().y1 == 2.25
    assert [text.get_text() for text in axes.texts] == ["8 GB", "$asked$"]


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
