"""Inputs whose messages are held word for word (tests/golden/errors.txt): recipes, the current folder, the terminal."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from unittest import mock

from tests.attacks.fuzz import here_door, nasty, recipe_door
from tests.attacks.fuzz.harness import Scene
from tests.attacks.fuzz.named_files import DEEP, LONG, Named
from tests.attacks.fuzz.seen import Command, Work, exit_code

# --- recipes ---------------------------------------------------------------------------------------------------------


def text(change: Callable[[str], str | bytes], name: str = "recipe.toml") -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        changed = change(recipe_door.recipe_text(scene))
        (scene.place / name).write_bytes(changed.encode() if isinstance(changed, str) else changed)
        return lambda: recipe_door.use(scene, str(scene.place / name), [], 1.0)

    return make


def with_key(line: str) -> Callable[[Scene], Work]:
    """One more line under [train], the last table of the recipe."""
    return text(lambda recipe: f"{recipe}{line}\n")


def setting(*overrides: str) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        (scene.place / "recipe.toml").write_text(recipe_door.recipe_text(scene))
        return lambda: recipe_door.use(scene, str(scene.place / "recipe.toml"), list(overrides), 0.02)

    return make


def recipe_entry(kind: str) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        nasty.entry(scene.place / "recipe.toml", kind, scene.bystander)
        return lambda: recipe_door.use(scene, str(scene.place / "recipe.toml"), [], 1.0)

    return make


RECIPES: Named = {
    "no such file": recipe_entry("gone"),
    "a folder": recipe_entry("folder"),
    "a pipe": recipe_entry("pipe"),
    "a device": recipe_entry("device"),
    "a circle of links": recipe_entry("loop"),
    "64 GiB": recipe_entry("huge"),
    "empty": recipe_entry("empty"),
    "not UTF-8": text(lambda recipe: recipe.encode() + b"# caf\xe9\n"),
    "an unfinished line": with_key("learning_rate ="),
    "a key twice": with_key("epochs = 2"),
    "a misspelt key": with_key("learnin_rate = 1e-4"),
    "another trainer's key": with_key("per_device_train_batch_size = 4"),
    "a text for a number": with_key('seed = "forty"'),
    "not a number": with_key("learning_rate = nan"),
    "10,000 digits": with_key(f"seed = {LONG}"),
    "nested 5,000 deep": with_key(f"x = {DEEP}"),
    "a text of 70,000 characters": with_key(f'lr_scheduler = "{"x" * 70_000}"'),
    "a rank of a billion": setting("lora.r=1000000000"),
    "a micro-batch of a billion": setting("train.micro_batch_size=1000000000", "train.batch_size=1000000000"),
    "a setting without a value": setting("lora.r"),
    "a setting of 10,000 digits": setting(f"lora.r={LONG}"),
    "nobody's home": setting('output.dir="~no-such-user/runs"'),
    "a base that is no name": setting('model.base="a/b/c"'),
    "a base that is not there": setting('model.base="/nowhere/at/all"'),
    "a NUL in a path": setting('output.dir="a\\u0000b"'),
}

# --- commands --------------------------------------------------------------------------------------------------------


def command(name: str, *words: str, **variables: str) -> Callable[[Scene], Work]:
    """A whole command with these words, in which HERE, RECIPE, BASE and RUN are the scene's."""

    def make(scene: Scene) -> Work:
        goods = scene.goods
        places = {"HERE": scene.place, "RECIPE": goods.recipe, "BASE": goods.base, "RUN": goods.run}

        def placed(word: str) -> str:
            for mark, place in places.items():
                word = word.replace(mark, str(place))
            return word

        def work() -> int:
            app = importlib.import_module(f"qlora.cli.{name}").app
            argv = [f"qlora-{name}", *map(placed, words)]
            with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ, variables):
                try:
                    app()
                except SystemExit as ended:
                    return exit_code(ended)
            return 0

        return Command(work)

    return make


TERMINAL: Named = {
    "no recipe": command("train"),
    "a recipe that is not there": command("train", "tiny.tml"),
    "two ways to begin": command("train", "RECIPE", "--resume", "--fresh"),
    "a check and a proof": command("train", "RECIPE", "--check", "--verify-resume"),
    "a setting of nothing": command("train", "RECIPE", "--check", "--set", "x"),
    "a setting of an unknown key": command("train", "RECIPE", "--check", "--set", "lora.rank=8"),
    "a setting that clears the screen": command("train", "RECIPE", "--check", "--set", "\x1b[2J\x1b]0;owned\x07=1"),
    "a setting in markup": command("train", "RECIPE", "--check", "--set", "[/nope]=1"),
    "a recipe that clears the screen": command("train", "\x1b[2J.toml"),
    "a recipe of half a letter": command("train", "caf\udce9.toml"),
    "nobody's recipe": command("train", "~no-such-user/x.toml"),
    "nobody's cache": command("train", "RECIPE", "--check", QLORA_CACHE="~no-such-user/cache"),
    "a cache that is a device": command("train", "RECIPE", "--check", QLORA_CACHE="/dev/null"),
    "a cache below a file": command("train", "RECIPE", "--check", QLORA_CACHE="/dev/null/x"),
    "no such card": command("estimate", "BASE", "--gpu", "nothing of the kind"),
    "a card that clears the screen": command("estimate", "BASE", "--gpu", "\x1b[2J"),
    "a size that is none": command("estimate", "BASE", "--vram", "12 apples"),
    "a size without end": command("estimate", "BASE", "--vram", "1e400GiB"),
    "a size of 5,000 digits": command("estimate", "BASE", "--vram", "9" * 5000),
    "a card and a size": command("estimate", "BASE", "--vram", "12GiB", "--gpu", "RTX 4090"),
    "too small a card": command("estimate", "BASE", "--vram", "1MiB", "--json"),
    "an export of nothing": command("export", "HERE/nothing"),
    "an export into the user's folder": command("export", "RUN", "--no-verify", "--out", "HERE/.."),
    "an importance of nothing": command("export", "RUN", "--no-verify", "--imatrix", "--out", "HERE/out"),
    "a limit that is never measured": command("export", "RUN", "--no-verify", "--max-kl", "0.1", "--out", "HERE/out"),
}

# --- the current folder ----------------------------------------------------------------------------------------------


def here(work: Callable[[Scene], Work], **files: str) -> Callable[[Scene], Work]:
    """Files (or kinds of entries) by their names, `/` as `__` and `.` as `_dot_`, where the command stands."""

    def make(scene: Scene) -> Work:
        for name, content in files.items():
            file = scene.place / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            if content in nasty.ENTRIES:
                nasty.entry(file, content, scene.bystander)
            else:
                file.write_text(content)
        here_door.trap(scene, "torch", False)
        here_door.trap(scene, "random", False)
        return work(scene)

    return make


def estimated(name: str) -> Callable[[Scene], Work]:
    return command("estimate", name, "--vram", "12GiB")


HERE: Named = {
    "nothing is named": here(estimated("")),
    "the folder itself": here(estimated(".")),
    "the folder above": here(estimated("..")),
    "a name in markup": here(estimated("[/nope]")),
    "a name in a folder of that name": here(estimated("owner/name"), owner__name__config_dot_json="{"),
    "a name in a folder without configuration": here(estimated("owner/name"), owner__name__x="x"),
    "a name that is a file": here(estimated("owner/name"), owner__name="x"),
    "a name that is nowhere": here(estimated("owner/name")),
    "a configuration that is a list": here(estimated("config.json"), config_dot_json="[]"),
    "a configuration that is a pipe": here(estimated("config.json"), config_dot_json="pipe"),
    "a configuration that is a link out": here(estimated("config.json"), config_dot_json="bystander"),
    "a configuration of no model": here(estimated("config.json"), config_dot_json='{"model_type": "x"}'),
    "a recipe that is a folder": here(estimated("recipe.toml"), recipe_dot_toml="folder"),
    "a recipe that is a link to itself": here(estimated("recipe.toml"), recipe_dot_toml="loop"),
    "another recipe than the one named": here(command("train", "tiny.toml"), quickstart_dot_toml=""),
    "rows that are not here": here(
        command("train", "a.toml", "--check"),
        a_dot_toml='[model]\nbase = "owner/name"\n[[data.train]]\npath = "rows.jsonl"\n',
        others_dot_csv="text\n",
    ),
    "a base that is not here": here(
        command("train", "a.toml", "--check"),
        a_dot_toml='[model]\nbase = "./base"\n[[data.train]]\npath = "rows.jsonl"\n',
        rows_dot_jsonl='{"text": "a"}\n',
    ),
    "a folder that is no run": here(command("export", ".", "--no-verify")),
    "an adapter without weights": here(command("export", ".", "--no-verify"), adapter_config_dot_json="{}"),
    "an adapter with a pipe": here(
        command("export", ".", "--no-verify"), adapter_config_dot_json="{}", README_dot_md="pipe"
    ),
    "a run without an adapter": here(command("export", ".", "--no-verify"), recipe_dot_toml=""),
    "a file called ~no-such-user": here(command("export", "~no-such-user", "--no-verify"), **{"~no-such-user": "x"}),
}
