"""Which base goes first, which one stays because it is used, and what a process that was killed leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora import disk, files, lock
from qlora.model.base_cache import places
from qlora.recipe.sections import MemorySection

NAMES = [f"{digit * 32}-nf4-double-{digit * 16}" for digit in "abc"]
SIZE = 1000


@pytest.fixture
def bases() -> Path:
    """Three bases of SIZE bytes and a manifest, a's last use the longest ago."""
    root = places.root()
    for number, name in enumerate(NAMES):
        published(root / name)
        places.see(root / name, {"model.safetensors": (number, number)})
        os.utime(root / f"{name}.seen", (1000 + number, 1000 + number))
    return root


def published(folder: Path, kind: str = "base") -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    disk.publish_folder(folder, lambda here: (here / "x.blob").write_bytes(b"1" * SIZE) and None, {"kind": kind})
    return folder


def names(bases: Path) -> list[str]:
    return [one.folder.name for one in places.held(bases)]


def test_the_one_used_longest_ago_comes_first(bases: Path) -> None:
    assert names(bases) == NAMES
    places.touch(bases / NAMES[0])
    assert names(bases) == [*NAMES[1:], NAMES[0]]
    (bases / "notes").mkdir()
    assert names(bases) == [*NAMES[1:], NAMES[0]] and places.held(bases)[0].bytes > SIZE


def test_room_is_made_by_the_oldest_that_nobody_uses(bases: Path) -> None:
    most = sum(one.bytes for one in places.held(bases))
    assert places.make_room(bases, 0, most) == [] and names(bases) == NAMES
    with places.using(bases / NAMES[0]):
        (gone,) = places.make_room(bases, SIZE // 2, most)
    assert gone.folder.name == NAMES[1] and names(bases) == [NAMES[0], NAMES[2]]
    assert not (bases / f"{NAMES[1]}.seen").exists()


def test_where_not_enough_can_go_none_goes(bases: Path) -> None:
    most = sum(one.bytes for one in places.held(bases))
    assert places.make_room(bases, 10 * most, most) == [] and names(bases) == NAMES
    with places.using(bases / NAMES[1]):
        assert places.make_room(bases, most, most) == [] and names(bases) == NAMES


def test_what_is_not_ours_is_counted_and_stays(bases: Path) -> None:
    """Changed since, published as something else, a link, or set aside."""
    (bases / NAMES[0] / "x.blob").write_bytes(b"mine")
    (bases / NAMES[1]).rename(bases / f"{NAMES[1]}.broken1")
    disk.discard(bases / NAMES[2])
    published(bases / NAMES[2], "tokens")
    before = sorted(bases.rglob("*"))
    assert len(places.held(bases)) == 3 and places.make_room(bases, 1, 1) == []
    assert sorted(bases.rglob("*")) == before


def test_two_use_one_and_it_is_free_when_both_are_done(bases: Path) -> None:
    folder = bases / NAMES[0]
    with places.using(folder):
        with places.using(folder):
            assert places.in_use(folder)
        assert places.in_use(folder) and not places.in_use(bases / NAMES[1])
    assert not places.in_use(folder) and not list(bases.glob("*.use-*"))


def test_what_killed_processes_left_is_swept_by_who_writes(bases: Path) -> None:
    left = bases / f"{NAMES[0]}.use-999999-0123abcd"
    left.write_text("{}")
    orphan = bases / f"{'d' * 32}-nf4-single-{'d' * 16}.seen"
    orphan.write_text("{}")
    mine = bases / "mine.seen"
    mine.write_text("x")
    half = bases / f".{NAMES[1]}.tmp-qlora-999999-01234567"
    half.mkdir()
    assert not places.in_use(bases / NAMES[0])
    with places.using(bases / NAMES[1]), places.writing(bases):
        assert not left.exists() and not orphan.exists() and not half.exists() and mine.exists()
        assert places.in_use(bases / NAMES[1])
        with pytest.raises(lock.LockHeld), places.writing(bases):
            pass
    assert names(bases) == NAMES


def test_files_are_known_by_sizes_and_times(bases: Path) -> None:
    folder = bases / NAMES[0]
    assert places.was_seen(folder, {"model.safetensors": (0, 0)})
    assert not places.was_seen(folder, {"model.safetensors": (0, 1)}) and not places.was_seen(folder, {})
    for number in range(20):
        places.see(folder, {"other.safetensors": (number, 5)})
    assert places.was_seen(folder, {"other.safetensors": (19, 5)})
    assert not places.was_seen(folder, {"model.safetensors": (0, 0)}), "there are copies without end"
    for text in ("", "[]", "{}", '{"places": [[]]}', '{"places": [{"a": "b"}]}', "[" * 100_000):
        (bases / f"{NAMES[0]}.seen").write_text(text)
        assert not places.was_seen(folder, {"other.safetensors": (19, 5)})


def test_a_link_is_neither_read_nor_written_through(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("ten years")
    seen = bases / f"{NAMES[0]}.seen"
    seen.unlink()
    seen.symlink_to(tmp_path / "thesis")
    assert "is a link" in str(places.distrusted(bases / NAMES[0]))
    with pytest.raises(OSError):
        places.see(bases / NAMES[0], {})
    (bases / ".lock").unlink(missing_ok=True)
    (bases / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(files.UnsafePathError), places.writing(bases):
        pass
    assert (tmp_path / "thesis").read_text() == "ten years"


def test_a_runs_no_is_one_beside_it_and_its_yes_is_its_own() -> None:
    modes = [places.mode_beside(MemorySection(cache=cache)) for cache in (True, False, "auto")]
    assert modes == ["auto", False, "auto"] and places.mode_beside(None) == "auto"
