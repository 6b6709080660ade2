"""The folder in which a command is started: programs under the names of modules, and files that libraries look for."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

COMMANDS = ("train", "export", "estimate")
# What is looked for by name in the current folder, by some library or tool.
FILES = (
    *("pyproject.toml", "setup.cfg", ".env", ".netrc", "sitecustomize.py", "usercustomize.py", "conftest.py", ".pth"),
    *(
        "config.json",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "recipe.toml",
        "model.safetensors",
    ),
    *("kernels", "runs", "owner", "~", "~nobody", "hub:x", "libggml.so", "libbitsandbytes_cpu.so", ".huggingface"),
    *("datasets_info.json", "dataset_infos.json", "README.md", "matplotlibrc", ".coveragerc", "python", "llama-cli"),
)
NAMES = (
    "good",
    "owner/name",
    "owner",
    ".",
    "..",
    "./owner/name",
    "config.json",
    "recipe.toml",
    "",
    "runs",
    "-",
    "~",
    "~nobody/x",
)
# Every so many inputs a real child is started where the traps lie; the others share the process.
CHILD_EVERY = 200
TRAP = "import os\nopen({marker!r}, 'w').close()\nraise SystemExit('a trap was imported')\n"


@cache
def modules() -> tuple[str, ...]:
    """Names that an import could find in the current folder before the right one."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    return tuple(
        sorted(name for name in {*loaded, *sys.stdlib_module_names} if name.isidentifier() and name != "qlora")
    )


def make(scene: Scene) -> Work:
    chance = scene.chance
    for name in chance.sample(modules(), 30):
        trap(scene, name, chance.random() < 0.3)
    for name in chance.sample(FILES, 4):
        plant(scene, name)
    (scene.place / "good").symlink_to(scene.goods.base)
    kind = chance.randrange(CHILD_EVERY)
    name = chance.choice(NAMES)
    if kind == 0:
        return lambda: child(scene, chance.choice(COMMANDS))
    return lambda: use(scene, name, render=kind < 4)


def trap(scene: Scene, name: str, package: bool) -> None:
    file = scene.place / name / "__init__.py" if package else scene.place / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(TRAP.format(marker=str(scene.marker)))


def plant(scene: Scene, name: str) -> None:
    chance, file = scene.chance, scene.place / name
    kind = chance.random()
    if file.exists():
        return
    if name == "owner":
        (file / "name").mkdir(parents=True)
        (file / "name" / "config.json").write_bytes(nasty.dumped(nasty.value(chance, scene.goods.drawn)))
    elif name.endswith(".py"):
        file.write_text(TRAP.format(marker=str(scene.marker)))
    elif kind < 0.5:
        file.write_bytes(nasty.dumped(nasty.value(chance, scene.goods.drawn, scene.paths)))
    else:
        nasty.entry(file, chance.choice(nasty.ENTRIES), scene.bystander)


def use(scene: Scene, name: str, render: bool) -> None:
    """What looks at the current folder: a name that may be a folder, a relative recipe; the worker of templates."""
    from qlora import api
    from qlora.model.resolve import resolve

    sink = goods.sink()
    if render:
        goods.chat_of.cache_clear()
        goods.chat_of(scene.goods.base, os.getpid())
    resolve(str(scene.goods.base), "main", sink)
    api.question(api.recipe_or_model(name), vram="12GiB", sink=sink)
    sink.close()


def child(scene: Scene, command: str) -> None:
    """A command as it is installed: without the current folder in its path of modules."""
    words = {
        "train": [str(scene.goods.recipe), "--check", "--set", "data.max_length=96"],
        "export": [str(scene.goods.run / "adapter"), "--out", str(scene.place / "out"), "--no-verify"],
        "estimate": [str(scene.goods.base), "--vram", "12GiB"],
    }[command]
    program = f"from qlora.cli.{command} import app; app()"
    path = os.pathsep.join((str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *words],
        env={**os.environ, "PYTHONPATH": path.strip(os.pathsep)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-1500:]}")


DOOR = Door("current folder", make, seconds=120.0)  # some inputs are whole commands
