"""A base in 4 bit that a stranger has put into the cache is not computed with; one that lies is not believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.model.base_cache import places
from tests.families import make_base
from tests.model.base_cache.cases import aged, assert_same, kept, load, resealed
from tests.sampling import sampled

SOMEBODY = 4321
THESIS = b"Chapter 1. Ten years of work."
PARTS = ("", "bases", "bases/NAME", "bases/NAME/layer-00000.blob", "bases/NAME/manifest.json", "bases/NAME.seen")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return aged(make_base("llama", tmp_path / "base"))


def planted(base: Path, tmp_path: Path) -> Path:
    """What a stranger would make: other weights under this base's name, sealed, and true to all its hashes."""
    load(base)
    (mine,) = kept()
    identity = json.loads((mine / "manifest.json").read_text())["identity"]
    seen = mine.with_name(f"{mine.name}.seen")
    remembered = seen.read_text()
    shutil.rmtree(mine)
    load(aged(make_base("llama", tmp_path / "theirs", seed=7)))
    (theirs,) = kept()
    theirs.with_name(f"{theirs.name}.seen").unlink()
    resealed(theirs, lambda said: said.update(identity=identity))
    seen.write_text(remembered)
    seen.chmod(0o600)
    return theirs.rename(mine)


def test_what_is_planted_would_be_read_if_it_were_ours(base: Path, tmp_path: Path) -> None:
    """Whoever can write as this user can: what follows keeps others from it."""
    planted(base, tmp_path)
    model, _ = load(base)
    plain, _ = load(base, cache=False)
    assert model.base_was_kept
    with pytest.raises(AssertionError):
        assert_same(model, plain)


def owned_by_another(path: Path) -> None:
    os.chown(path, SOMEBODY, -1, follow_symlinks=False)


def open_to_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, SOMEBODY)
    path.chmod(path.stat().st_mode | 0o020)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "how", sampled([owned_by_another, open_to_all, open_to_a_group], owned_by_another, open_to_all)
)
def test_what_others_could_have_written_is_not_computed_with(
    base: Path, tmp_path: Path, how: Callable[[Path], None], part: str
) -> None:
    plain, _ = load(base, cache=False)
    name = planted(base, tmp_path).name
    place = tmp_path / "cache" / part.replace("NAME", name)
    how(place)
    before = {path: path.lstat().st_mtime_ns for path in places.root().rglob("*") if path.name != ".lock"}
    model, said = load(base)
    assert not model.base_was_kept
    assert_same(model, plain)
    assert said[0].startswith(f"{place} ") and "is not read" in said[0], said
    assert ("another user (number 4321)" in said[0]) == (how is owned_by_another)
    after = {path: path.lstat().st_mtime_ns for path in places.root().rglob("*") if path.name != ".lock"}
    assert after == before, "and nothing is written there"


@pytest.mark.parametrize("part", PARTS[1:])
def test_no_link_is_followed(base: Path, tmp_path: Path, part: str) -> None:
    plain, _ = load(base, cache=False)
    name = planted(base, tmp_path).name
    place = tmp_path / "cache" / part.replace("NAME", name)
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    model, said = load(base)
    assert not model.base_was_kept and f"{place} is a link" in said[0], said
    assert_same(model, plain)
    assert place.is_symlink() and elsewhere.exists()


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file of the user's": lambda said: said["blobs"][0].update(file="../../../thesis.txt"),
    "a file of the user's among the files": lambda said: said["files"].update(
        {"../../../thesis.txt": {"sha256": "0" * 64, "bytes": len(THESIS)}}
    ),
    "an exabyte": lambda said: said["blobs"][0].update(bytes=1 << 60),
    "a matrix of an exabyte": lambda said: said["blobs"][0]["pieces"][-1].update(shape=[1 << 30, 1 << 17]),
    "a million pieces": lambda said: said["blobs"][0].update(
        pieces=[{"name": "x", "part": "codes", "dtype": "U8", "shape": [0], "offset": 0}] * 1_000_000
    ),
    "a million tables": lambda said: said.update(tables=[[0.0]] * 1_000_000),
    "a name that steers a terminal": lambda said: said["blobs"][0]["pieces"][0].update(name="\x1b[2Jx.weight"),
    "a layer that is a method": lambda said: said["blobs"][0].update(layer="model.__class__"),
    "blocks of a byte": lambda said: [one.update(blocksize=1) for one in said["four_bit"].values()],
    "a deep value": lambda said: said.update(base=json.loads("[" * 60 + "]" * 60)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_manifest_that_lies_is_set_aside(base: Path, tmp_path: Path, lie: Callable[[dict[str, Any]], Any]) -> None:
    """Constants of another length would have bitsandbytes' kernels read past their end."""
    (tmp_path / "thesis.txt").write_bytes(THESIS)
    plain, _ = load(base)
    folder = kept()[0]
    resealed(folder, lie)
    model, said = load(base)
    assert not model.base_was_kept and "is not read from the cache" in said[0] and f"{folder.name}.broken1" in said[0]
    assert_same(model, plain)
    assert (tmp_path / "thesis.txt").read_bytes() == THESIS and len(said[0]) < 1000
    assert load(base)[0].base_was_kept
