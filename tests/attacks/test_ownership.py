"""What qlora did not make it neither replaces, renames nor removes: a disk of somebody's own files stays as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import api, disk, manifest, run_folder
from qlora.cli import export as export_command
from qlora.cli import train as train_command
from qlora.recipe.reading import load_recipe
from tests.attacks.world import World, refused

Out = Callable[[World], "Path | str"]
NONE = "0" * 64


# --- folders that look like an export's ------------------------------------------------------------------------------

ENTRY = {"sha256": NONE, "bytes": 6}
# What stands in manifest.json of a folder of web pages.
MANIFESTS: dict[str, Any] = {
    "a web app": {"name": "My app", "short_name": "app", "start_url": "/", "icons": []},
    "a browser extension": {"manifest_version": 3, "name": "Blocker", "version": "1.0", "files": ["a.js"]},
    "nothing": {},
    "a list": [],
    "a text": "qlora",
    "null": None,
    "files of another program": {"files": {"index.html": ENTRY}, "sha256": NONE},
    "files without sizes": {"files": {"index.html": "abc"}, "sha256": NONE},
    "files as a list": {"files": ["index.html"], "sha256": NONE},
    "a boast": {"made_by": "qlora", "kind": "export", "files": {}, "sha256": NONE},
    "no hash of itself": {"made_by": "qlora", "kind": "export", "files": {"index.html": ENTRY}},
}
SEALED: dict[str, dict[str, Any]] = {
    "made by another program": {"made_by": "npm", "kind": "export", "files": {"index.html": ENTRY}},
    "of nothing known": {"files": {"index.html": ENTRY}},
    "of an adapter": {"made_by": "qlora", "kind": "adapter", "files": {"index.html": ENTRY}},
    "of tokens": {"made_by": "qlora", "kind": "tokens", "files": {}},
    "with a file above": {"made_by": "qlora", "kind": "export", "files": {"../thesis.txt": ENTRY}},
    "with a file of the system": {"made_by": "qlora", "kind": "export", "files": {"/etc/passwd": ENTRY}},
    "with a negative size": {"made_by": "qlora", "kind": "export", "files": {"index.html": {**ENTRY, "bytes": -1}}},
    "with a NUL": {"made_by": "qlora", "kind": "export", "files": {"a\0b": ENTRY}},
}
TEXTS: dict[str, str] = {
    "an empty file": "",
    "no JSON": "{",
    "a million brackets": "[" * 1_000_000,
    "a number of ten thousand digits": '{"files": {}, "sha256": ' + "9" * 10_000 + "}",
    "a key twice": '{"files": {}, "files": {}, "sha256": ""}',
    "not a number": '{"files": NaN}',
    "a million entries": '{"files": {' + ",".join(f'"{n}":0' for n in range(1_000_000)) + "}}",
}


def page(text: str) -> Out:
    return lambda world: world.folder("app", manifest_json=text)


def manifest_is(make: Callable[[World, Path], object]) -> Out:
    def put(world: World) -> Path:
        folder = world.folder("app")
        make(world, folder / disk.MANIFEST)
        return folder

    return put


def sparse(world: World, path: Path) -> None:
    path.touch()
    os.truncate(path, 64 << 30)


def made(world: World, name: str, make: Callable[[Path], object]) -> Path:
    path = world.home / name
    make(path)
    return path


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def part(**files: str) -> Out:
    """`.out.part` of the user's, with such files."""

    def put(world: World) -> Path:
        folder = world.home / ".out.part"
        folder.mkdir()
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return world.home / "out"

    return put


def part_is(make: Callable[[World, Path], object]) -> Out:
    def put(world: World) -> Path:
        make(world, world.home / ".out.part")
        return world.home / "out"

    return put


def linked_part(name: str, target: str) -> Out:
    def put(world: World) -> Path:
        folder = world.home / ".out.part"
        (folder / "files").mkdir(parents=True)
        (folder / "part.json").write_text('{"made_by": "qlora", "kind": "part"}')
        if (folder / name).is_dir():
            (folder / name).rmdir()
        (folder / name).symlink_to(world.home / target)
        return world.home / "out"

    return put


def in_run(name: str) -> Out:
    return lambda world: world.run / name


MARK = '{"made_by": "qlora", "kind": "part"}'
OUTS: dict[str, Out] = {
    **{f"manifest: {name}": page(json.dumps(value)) for name, value in MANIFESTS.items()},
    **{f"sealed manifest: {name}": page(manifest.sealed(value)) for name, value in SEALED.items()},
    **{f"manifest: {name}": page(text) for name, text in TEXTS.items()},
    "manifest: a folder": manifest_is(lambda world, path: path.mkdir()),
    "manifest: a pipe": manifest_is(lambda world, path: os.mkfifo(path)),
    "manifest: a link to an adapter's": manifest_is(
        lambda world, path: path.symlink_to(world.adapter / "manifest.json")
    ),
    "manifest: 64 GiB": manifest_is(sparse),
    "photographs": lambda world: world.photos,
    "a folder with a hidden file": lambda world: world.folder("hidden", _profile="mine"),
    "a folder with an empty folder": lambda world: made(world, "a", lambda path: (path / "b").mkdir(parents=True)),
    "a file": lambda world: world.thesis,
    "below a file": lambda world: world.thesis / "out",
    "a pipe": lambda world: made(world, "pipe", os.mkfifo),
    "a socket": lambda world: made(world, "socket", unix_socket),
    "a device": lambda world: "/dev/null",
    "a link to photographs": lambda world: made(world, "link", lambda path: path.symlink_to(world.photos)),
    "a link to a file": lambda world: made(world, "link", lambda path: path.symlink_to(world.thesis)),
    "a link to itself": lambda world: made(world, "link", lambda path: path.symlink_to(path)),
    "a name of 256 letters": lambda world: world.home / ("x" * 256),
    "a path of 5,000 letters": lambda world: world.home.joinpath(*["x" * 99] * 50),
    "a NUL": lambda world: f"{world.home}/a\0b",
    "the home of nobody": lambda world: "~nobody-at-all/out",
    "the home": lambda world: world.home,
    "the root": lambda world: "/",
    "the run": lambda world: world.run,
    "the run, spelled otherwise": lambda world: f"{world.run}/export/..",
    "the run through a link": lambda world: made(world, "r", lambda path: path.symlink_to(world.run)),
    "the runs": lambda world: world.run.parent,
    "the adapter": lambda world: world.adapter,
    "in the adapter": in_run("adapter/new"),
    "the checkpoints": in_run("checkpoints"),
    "a checkpoint": in_run("checkpoints/step-000001"),
    "a new checkpoint": in_run("checkpoints/step-000002"),
    "new in the run": in_run("merged"),
    "the lock": in_run(".lock"),
    "the events": in_run("events.jsonl"),
    "the report": in_run("report.html"),
    "the base": lambda world: world.base,
    "in the base": lambda world: world.base / "merged",
    "what holds the base": lambda world: world.base.parent,
    "the rows": lambda world: world.rows,
    "in the rows": lambda world: world.rows / "merged",
    "a file of the rows": lambda world: world.rows / "train.jsonl",
    "the cache": lambda world: disk.cache_dir() / "merged",
    "the hub's cache": lambda world: Path(__import__("huggingface_hub").constants.HF_HUB_CACHE) / "merged",
    "another adapter of ours": lambda world: Path(shutil.copytree(world.adapter, world.home / "v1")),
    "part: documents": part(chapter_txt="1"),
    "part: a folder called files": part(files__chapter_txt="1"),
    "part: a lock of somebody": part(lock="do not touch"),
    "part: a journal of somebody": part(journal_json='{"monday": "rain"}', files__a="1"),
    "part: a mark of another program": part(part_json='{"made_by": "npm", "kind": "part"}', files__a="1"),
    "part: a file beside ours": part(part_json=MARK, chapter_txt="1"),
    "part: a file": part_is(lambda world, path: path.write_text("mine")),
    "part: a pipe": part_is(lambda world, path: os.mkfifo(path)),
    "part: a link to photographs": part_is(lambda world, path: path.symlink_to(world.photos)),
    "part: a link to nothing": part_is(lambda world, path: path.symlink_to(world.home / "none")),
    "part: files is a link": linked_part("files", "photos"),
    "part: the lock is a link": linked_part("lock", "thesis.txt"),
    "part: the journal is a link": linked_part("journal.json", "thesis.txt"),
    "part: a file is a link": linked_part("files/model.safetensors", "thesis.txt"),
}


REASONS = (
    r"was not made by an export|is not an export|where only export/ is for exports|(lies in|holds) the (base|adapter)"
    r"|(lies in|holds) the rows|lies in the (hub's )?cache|is a file, and|cannot be an export's folder"
    r"|links lead in a circle|NUL|no such home|too long"
)


@pytest.mark.parametrize("name", OUTS)
def test_an_export_refuses_what_it_did_not_make(
    world: World, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(world.home))
    out = OUTS[name](world)
    before = world.snapshot()
    said = refused(lambda: api.merge_and_export(world.run, out=out, options=api.export_options(verify=False)), capsys)
    assert world.snapshot() == before and re.search(REASONS, said), said


@pytest.mark.parametrize("kind", ["a folder", "a link to photographs", "a file"])
def test_one_of_several_artifacts_is_refused_before_any_is_made(
    world: World, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.home / "out"
    out.mkdir()
    if kind == "a folder":
        shutil.copytree(world.photos, out / "gguf-q8_0")
    elif kind == "a file":
        (out / "gguf-q8_0").write_text("mine")
    else:
        (out / "gguf-q8_0").symlink_to(world.photos)
    before = world.snapshot()
    said = refused(lambda: api.merge_and_export(world.run, to=["hf", "gguf"], out=out), capsys)
    assert "gguf-q8_0" in said and world.snapshot() == before


# --- folders that are an export's ------------------------------------------------------------------------------------


def export(world: World, out: Path, *more: str) -> None:
    with pytest.raises(SystemExit) as end:
        export_command.app([str(world.run), "--out", str(out), "--no-verify", *more])
    assert not end.value.code


def test_an_earlier_export_is_replaced_a_changed_one_kept_and_said(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.home / "out"
    export(world, out)
    assert manifest.standing(out, hashes=True).whose == "ours" and manifest.read(out)["of"]["adapter"] == "tiny"
    inode = out.stat().st_ino
    export(world, out)
    assert out.stat().st_ino != inode and not (world.home / "out.1").exists()
    (out / "README.md").write_text("my own card, of another length")
    (world.home / "out.1").mkdir()  # taken already, though empty
    capsys.readouterr()
    export(world, out)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"kept: {world.home / 'out.2'} (") and "MiB" in last
    assert (world.home / "out.2" / "README.md").read_text() == "my own card, of another length"
    (out / "notes.txt").write_text("of mine")
    export(world, out, "--json")
    product = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["products"][0]
    assert product["set_aside"] == str(world.home / "out.3") and product["set_aside_bytes"] > 10_000
    assert (world.home / "out.3" / "notes.txt").read_text() == "of mine"
    assert manifest.standing(out, hashes=True).whose == "ours" and not list((world.home / "out.1").iterdir())


# --- a run's folder --------------------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[Path], object]] = {
    "photographs": lambda path: (path / "1997.jpg").write_text("jpg"),
    "a recipe of the user's": lambda path: (path / "recipe.toml").write_text("[soup]\nsalt = 1\n"),
    "a recipe for us": lambda path: (path / "recipe.toml").write_text('[model]\nbase = "a/b"\n'),
    "a copied recipe": lambda path: (path / "recipe.toml").write_text("# written by qlora 0.5; every key resolved\n"),
    "events of another program": lambda path: (path / "events.jsonl").write_text('{"type": "start"}\n'),
    "a folder called adapter": lambda path: (path / "adapter").mkdir(),
    "a folder called checkpoints": lambda path: (path / "checkpoints" / "step-000001").mkdir(parents=True),
    "a run.json of another program": lambda path: (path / "run.json").write_text('{"made_by": "npm", "kind": "run"}'),
    "a broken run.json": lambda path: (path / "run.json").write_text("{"),
    "a run.json that is a pipe": lambda path: os.mkfifo(path / "run.json"),
    "a web app": lambda path: (path / "manifest.json").write_text("{}"),
    "a lock of somebody": lambda path: (path / ".lock").write_text("do not touch"),
    "an empty folder": lambda path: (path / "empty").mkdir(),
    "a hidden file": lambda path: (path / ".notes.tmp-1").write_text("mine"),
}


@pytest.mark.parametrize("mode", ["new", "fresh", "resume"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_refuses_a_folder_that_is_none(
    world: World, name: str, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(world.run)
    world.run.mkdir()
    RUNS[name](world.run)
    before = world.snapshot()
    refused(lambda: api.train(world.recipe, mode=mode), capsys)
    if mode != "resume":
        refused(lambda: run_folder.claim(world.run, mode), capsys)  # a moment later it is looked at again
    assert world.snapshot() == before


NAMES = ["", ".", "..", "...", " ", "a/b", "/etc", "a\\b", "a\0b", "a\nb", "x" * 300, "con", "COM1.toml", "lpt9", "NUL"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["new", "fresh", "resume"])
def test_a_runs_name_is_one_plain_part_of_a_path(
    world: World, name: str, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = world.snapshot()
    loaded = load_recipe(world.recipe)
    said = refused(lambda: api.train(loaded, name=name, mode=mode) if name else run_folder.path_of(loaded, ""), capsys)
    assert "cannot be the name of a run's folder" in said and world.snapshot() == before


KINDS_OF_OURS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(("recipe.toml", "events.jsonl", ".lock"), Path.mkdir),
    **dict.fromkeys(("events.jsonl ", "adapter "), os.mkfifo),
    **dict.fromkeys(("adapter", "checkpoints", "export", "tokenizer", "checkpoints/step-000009"), Path.touch),
}


@pytest.mark.parametrize("name", KINDS_OF_OURS)
def test_what_is_no_file_or_no_folder_as_a_run_has_it(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.run / name.strip()
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    KINDS_OF_OURS[name](path)
    before = world.snapshot()
    for mode in ("fresh", "resume"):
        refused(lambda mode=mode: api.train(world.recipe, mode=mode), capsys)  # type: ignore[misc]
    assert world.snapshot() == before


def test_a_run_cannot_lie_where_no_path_leads(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_recipe(world.recipe, [f'output.dir="{world.home / ("x" * 256)}"'])
    assert "too long" in refused(lambda: api.train(loaded, name="tiny"), capsys)


def test_a_recipe_of_dots_renames_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name without the ending is "..": the folder above output.dir."""
    dots = Path(shutil.copy(world.recipe, world.home / "...toml"))
    before = world.snapshot()
    with pytest.raises(SystemExit) as end:
        train_command.app([str(dots), "--fresh"])
    assert end.value.code == 2 and "'..'" in capsys.readouterr().err and world.snapshot() == before


def test_a_run_of_ours_is_kept_under_another_name_with_all_that_is_in_it(world: World) -> None:
    (world.run / "notes.txt").write_text("of mine")
    (world.run.with_name("tiny.1")).write_text("taken")
    inside = {path.name: path.stat().st_ino for path in world.run.iterdir()}
    held = run_folder.claim(world.run, "fresh")
    held.release()
    assert held.aside is not None and held.aside.folder == world.run.with_name("tiny.2")
    assert {path.name: path.stat().st_ino for path in held.aside.folder.iterdir()} == inside
    content = sum(path.lstat().st_size for path in held.aside.folder.rglob("*") if path.is_file())
    assert 0 <= held.aside.bytes - content < 200  # the lock named its holder
    assert run_folder.kept(held.aside).startswith(f"it is kept as {held.aside.folder} (")


def test_what_a_desktop_leaves_in_a_folder_is_no_harm(world: World) -> None:
    for place in (world.run, world.run / "checkpoints"):
        (place / ".DS_Store").write_text("icons")
    run_folder.claim(world.run, "resume").release()
    assert [path.read_text() for path in sorted(world.run.rglob(".DS_Store"))] == ["icons", "icons"]


def test_a_run_that_trained_nothing_is_taken_again_and_nothing_else_of_it_goes(world: World) -> None:
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(world.run / name)
    (world.run / "notes.txt").write_text("of mine")
    before = world.snapshot()
    run_folder.claim(world.run, "new").release()
    after = world.snapshot()
    assert set(before) - set(after) == {"runs/tiny/events.jsonl"}
    assert {name: after[name] for name in after if name != "runs"} == {
        name: before[name] for name in after if name != "runs"
    }


def test_there_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    runs = 3 * (len(RUNS) + len(NAMES)) + 2 * len(RUNS)
    print(f"{len(OUTS) + 3} folders for exports, {runs} for runs")
    assert len(OUTS) >= 75 and runs >= 100
