"""Cached tokens that somebody else may have put there: manifest, report, Arrow bytes, entries, rights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.adapter_door import sign
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work


def make(scene: Scene) -> Work:
    chance, drawn, kind = scene.chance, scene.goods.drawn, scene.chance.random()
    cache = scene.place / "cache"
    shutil.copytree(scene.goods.cache, cache)
    folder = next(path for path in sorted((cache / "tokens").iterdir()))
    if kind < 0.35:
        nasty.json_file(folder / "report.json", chance, drawn, scene.paths)
        sign(folder)
    elif kind < 0.5:
        nasty.json_file(folder / "manifest.json", chance, drawn, scene.paths)
    elif kind < 0.75:
        arrow(folder / "rows.arrow", scene)
        if chance.random() < 0.9:
            sign(folder)
    elif kind < 0.9:
        names = ("report.json", "manifest.json", "rows.arrow", ".", "..", "../.x.tmp-1", "../.x.old-1", "x")
        name = chance.choice(names)
        nasty.entry((folder / name).absolute(), chance.choice(nasty.ENTRIES), scene.bystander)
        if chance.random() < 0.3 and name in ("report.json", "x"):
            sign(folder)
    else:
        place = chance.choice((folder, cache, cache / "tokens", folder / "report.json", folder / "rows.arrow"))
        if chance.random() < 0.5 and os.getuid() == 0:
            os.chown(place, 12345, 12345)
        else:
            place.chmod(chance.choice((0o777, 0o000, 0o4755, 0o666, 0o722)))
    named = str(cache) if chance.random() < 0.97 else chance.choice((*nasty.TEXTS[2:], *scene.paths))
    if not scene.spares(named):
        named = str(cache)
    return lambda: use(scene, named)


def arrow(file: Path, scene: Scene) -> None:
    """The tokens: scratched bytes, or other values and types in a file that is well formed."""
    import pyarrow

    chance = scene.chance
    good = file.read_bytes()
    if chance.random() < 0.5:
        nasty.replace(file, nasty.scratched(good, chance))
        return
    table = pyarrow.ipc.open_stream(good).read_all()
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    name = chance.choice(sorted(columns))
    number = chance.choice((0, -1, 383, 384, 1 << 30, -(1 << 31)))
    others: tuple[list[Any], ...] = (
        [[number] * 3], [number], ["x"], ["\x1b[2J:1"], [None], [b"x" * 16], [""], [[float("nan")] * 3], [[]],
        ['{"messages": 1}'], ["{"], ['{"messages": [], "tools": null, "expected": "x", "evil": 1}'], [json.dumps([1])],
    )  # fmt: skip
    kind = chance.random()
    if kind < 0.1:
        del columns[name]
    elif kind < 0.15:
        columns = {key: [] for key in columns}
    else:
        columns[name] = chance.choice(others) * len(columns[name])
    made = pyarrow.table(columns)
    if chance.random() < 0.5:
        for field in table.schema:
            at = made.schema.get_field_index(field.name)
            try:
                made = made.set_column(at, field, made.column(at).cast(field.type))
            except (pyarrow.ArrowException, IndexError, ValueError):
                continue
    file.unlink()
    with pyarrow.ipc.new_stream(str(file), made.schema) as stream:
        stream.write_table(made)


def use(scene: Scene, cache: str) -> None:
    """Rows for a run, and what the run reads of them."""
    from qlora import disk
    from qlora.data.prepare import prepare
    from qlora.model.tokenizer_files import read_files

    recipe, base = scene.goods.loaded(), scene.goods.base
    sink = goods.sink()
    with mock.patch.dict(os.environ, QLORA_CACHE=cache.replace("\0", "").encode("utf-8", "replace").decode()):
        chat = goods.chat_of(base, os.getpid())
        data = prepare(recipe.data, read_files(base).fingerprint, chat, recipe.train.seed, disk.cache_dir(), sink)
    for split in (data.train, data.eval):
        for index in range(min(3, len(split.lengths))):
            assert split.rows[index] is not None
            split.prompt(index)
    sink.close()


DOOR = Door("cache", make)
