"""A run's folder from a stranger, resumed: recipe, events, checkpoints with their states and manifests, lock, links."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.adapter_door import sign
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

ENTRIES = (
    *(
        ".lock",
        "events.jsonl",
        "recipe.toml",
        "run.json",
        "checkpoints",
        "adapter",
        "export",
        "checkpoints/step-000002",
    ),
    *("checkpoints/step-000002/state.json", "checkpoints/step-000002/manifest.json", "adapter/qlora.json"),
    *("checkpoints/step-000009", "checkpoints/.step-000003.tmp-1", ".adapter.old-1", "checkpoints/.x.old-swap-1"),
    *("checkpoints/step-000002/optimizer.safetensors", "checkpoints/step-000002/adapter.safetensors", "tokenizer"),
)
EVENT_LINES = (
    b"\n", b"null\n", b"[]\n", b"{}\n", b'{"event": "step"}\n', b'{"event": "step", "step": "x"}\n', b"\xff\xfe\n",
    b'{"event": "step", "step": 1e400}\n', b'{"event": "step", "step": ' + b"9" * 9000 + b"}\n", b"[" * 90_000 + b"\n",
    b'{"event": ["step"], "step": {}}\n', b"x" * 2_000_000 + b"\n", b"\0" * 1000,
)  # fmt: skip
STEP_NAMES = (
    "step-٣",
    "step-²",
    "step-" + "9" * 5000,
    "step-000002.broken1",
    "step-",
    "step--1",
    "step-1e3",
    "step-00007",
)


def make(scene: Scene) -> Work:
    chance, drawn = scene.chance, scene.goods.drawn
    run = scene.place / "runs" / "tiny"
    shutil.copytree(scene.goods.run, run)
    step = run / "checkpoints" / "step-000002"
    kind = chance.random()
    if kind < 0.35:
        nasty.json_file(step / "state.json", chance, drawn, scene.paths)
        if chance.random() < 0.85:
            sign(step)
    elif kind < 0.5:
        nasty.json_file(step / "manifest.json", chance, drawn, scene.paths)
    elif kind < 0.6:
        nasty.safetensors_file(step / chance.choice(("adapter.safetensors", "optimizer.safetensors")), chance, drawn)
        sign(step)
    elif kind < 0.7:
        text = (run / "recipe.toml").read_bytes()
        nasty.replace(run / "recipe.toml", nasty.scratched(text, chance))
    elif kind < 0.8:
        lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines)), chance.choice(EVENT_LINES))
        nasty.replace(run / "events.jsonl", b"".join(lines))
    elif kind < 0.84:
        (run / ".lock").write_bytes(
            nasty.dumped({"pid": nasty.value(chance, drawn), "host": nasty.value(chance, drawn)})
        )
    elif kind < 0.88:
        name = chance.choice(STEP_NAMES)
        if len(name) < 250:
            shutil.copytree(step, run / "checkpoints" / name)
    else:
        nasty.entry(run / chance.choice(ENTRIES), chance.choice(nasty.ENTRIES), scene.bystander)
    mode = chance.choice(("resume", "resume", "resume", "fresh", "new"))
    whole = chance.random() < 0.004
    return lambda: use(scene, mode, whole)


def use(scene: Scene, mode: Any, whole: bool) -> None:
    """A run that begins; unless `whole`, on a model that was made before, and no further than its checkpoint."""
    from qlora import api
    from qlora.recipe.reading import load_recipe
    from qlora.training.phases import PhaseClock

    recipe = load_recipe(scene.goods.recipe, (*goods.SETTINGS, f"output.dir={json.dumps(str(scene.place / 'runs'))}"))
    sink = goods.sink()

    @contextmanager
    def made_before(_recipe: Any, run_dir: Path, *others: Any) -> Any:
        *_, sink, _stop = others
        yield replace(scene.goods.job, run_dir=run_dir, sink=sink, clock=PhaseClock(sink))

    with ExitStack() as stack:
        if not whole:
            stack.enter_context(mock.patch("qlora.training.setup.prepare_job", made_before))
            stack.enter_context(mock.patch("qlora.training.loop.run", put_back))
        api.train(recipe, name="tiny", mode=mode, sink=sink)
    sink.close()


def put_back(job: Any, checkpoint: Any) -> Any:
    from qlora.training.loop import Training

    training = Training(job)
    return training.completed if checkpoint is None else training.checkpointer.resume(checkpoint)


DOOR = Door("run", make)
