"""A recipe from a stranger or a tired user: the file, `--set` values, and every path that it may name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

from qlora.recipe.reading import key_names
from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

KEYS = [
    *key_names(),
    "model.bse",
    "lora.rank",
    "x.y",
    "train.epochs",
    "model",
    "data.train",
    "data",
    '"a b".c',
    "a.b.c.d",
]
TOML = (
    "[]", "{}", '["a"]', "[1, [2]]", "'; touch x'", "1979-05-27", "07:32:00", "'''\n'''", "nan", "-inf", "0x", "0xff",
    '"nf4"', "auto", "1" * 10_000, "1e" + "9" * 5000, "[" * 3000 + "]" * 3000, "{a=" * 1000 + "1" + "}" * 1000, "1_000",
    '"\\u0000"', '"\\U0001F600"', "true", "10000000000", "1000000000000000000000", "0", "-1", "0.5",
    '"' + "x" * 70_000 + '"', "1e300", "1e-300",
    '"all-linear"', '["(a+)+$"]', "inf", '""', '"\\u001b[2J"', '["hf", "gguf:q4_k_m"]',
)  # fmt: skip


def toml_value(chance: Random, scene: Scene) -> str:
    if chance.random() < 0.5:
        return chance.choice(TOML)
    value = nasty.value(chance, scene.goods.drawn, scene.paths)
    return nasty.dumped(value).decode("utf-8", "surrogatepass")


def recipe_text(scene: Scene) -> str:
    return (
        f'[model]\nbase = "{scene.goods.base}"\n[[data.train]]\npath = "{scene.goods.recipe.parent / "rows.jsonl"}"\n'
        f'[output]\ndir = "{scene.place / "runs"}"\n[lora]\nr = 8\n[train]\nepochs = 1\n'
    )


def make(scene: Scene) -> Work:
    chance, kind = scene.chance, scene.chance.random()
    file, overrides = scene.place / "recipe.toml", []
    text = recipe_text(scene).encode()
    if kind < 0.25:
        text = nasty.scratched(text, chance)
    elif kind < 0.45:
        pairs = [(chance.choice(KEYS), toml_value(chance, scene)) for _ in range(chance.randrange(6))]
        text = "".join(f"{key} = {value}\n" for key, value in pairs).encode("utf-8", "surrogatepass")
    elif kind < 0.75:
        for _ in range(chance.randrange(1, 3)):
            overrides.append(f"{chance.choice(KEYS)}={toml_value(chance, scene)}")
    elif kind < 0.8:
        overrides.append(chance.choice((*nasty.TEXTS, "=", "a=", "=1", "lora.r", "a.b=1=2", "lora.r=16 # x\n[x]")))
    file.write_bytes(text)
    path = str(file)
    if kind > 0.92:
        nasty.entry(file, chance.choice(nasty.ENTRIES), scene.bystander)
    elif kind > 0.88:
        path = chance.choice((*nasty.TEXTS, *scene.paths))
        path = path if chance.random() < 0.4 else f"{path}.toml"
    elif kind > 0.8:
        key = chance.choice(("model.base", "output.dir", "data.train"))
        named = chance.choice((*nasty.TEXTS, *scene.paths))
        value = [{"path": named}] if key == "data.train" else named
        overrides.append(f"{key}={toml(value)}")
    depth = chance.random()
    return lambda: use(scene, path, overrides, depth)


def toml(value: Any) -> str:
    """A text, a list or a table of them, as TOML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    text = json.dumps(value, ensure_ascii=False)  # an escape of half a surrogate pair is none in TOML
    return "".join(f"\\u{ord(letter):04x}" if letter == "\x7f" else letter for letter in text)


def use(scene: Scene, path: str, overrides: list[str], depth: float) -> None:
    """What the commands do with a recipe, up to its base, its rows and the run's folder."""
    from qlora import api, run_folder
    from qlora.training import setup

    sink = goods.sink()
    recipe = api.recipe_or_model(path, overrides)
    run_dir = run_folder.path_of(recipe, Path(path).stem)
    run_folder.check_claim(run_dir, recipe, "new")
    setup.preflight(recipe, sink)
    if depth < 0.03:
        api.question(recipe, vram="12GiB", sink=sink).estimate()
    elif depth < 0.04:
        api.check(recipe, sink=sink)
    sink.close()
    assert os.getcwd() == str(scene.place)


DOOR = Door("recipe", make)
