"""An adapter from a stranger: PEFT's configuration, our provenance, header of its tensors, manifest, entries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

MORE_KEYS = (
    *("rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "target_parameters", "lora_bias", "use_rslora", "use_dora", "r", "lora_alpha", "bias"),
    *("base_model_name_or_path", "revision", "init_lora_weights", "peft_type", "fan_in_fan_out", "exclude_modules"),
)
PATTERNS = (
    "(a+)+$", "(.*)*x", "((((((a*)*)*)*)*)*)*b", "(", "[", "*", "(?P<x>", "a{1,99999999}", "(a|a)*" * 20 + "b",
    "\\", "(?<=a)b", "^" * 5000, "(x" * 5000, "q_proj", ".*", "(?R)", "\\1", "(?i)(?s)", "\x1b[2J",
)  # fmt: skip


def make(scene: Scene) -> Work:
    folder, chance, drawn = scene.place / "adapter", scene.chance, scene.goods.drawn
    shutil.copytree(scene.goods.run / "adapter", folder)
    kind = chance.random()
    whole = chance.random() < 0.01
    signed = chance.random() < 0.7
    config = folder / "adapter_config.json"
    if kind < 0.35:
        nasty.json_file(config, chance, drawn, scene.paths)
    elif kind < 0.5:
        tree = json.loads(config.read_text())
        tree[chance.choice(MORE_KEYS)] = nasty.value(chance, drawn, scene.paths)
        nasty.replace(config, nasty.dumped(tree))
    elif kind < 0.57:
        tree = json.loads(config.read_text())
        key = chance.choice(("rank_pattern", "alpha_pattern"))
        tree[key] = {chance.choice(PATTERNS): chance.choice((8, 16, 10**9, "x", None)) for _ in range(3)}
        nasty.replace(config, nasty.dumped(tree))
    elif kind < 0.72:
        nasty.json_file(folder / "qlora.json", chance, drawn, scene.paths)
    elif kind < 0.85:
        nasty.safetensors_file(folder / "adapter_model.safetensors", chance, drawn)
    elif kind < 0.91:
        signed = False
        nasty.json_file(folder / "manifest.json", chance, drawn, scene.paths)
    else:
        signed = False
        names = [path.name for path in sorted(folder.iterdir())]
        nasty.entry(folder / chance.choice([*names, "x.json"]), chance.choice(nasty.ENTRIES), scene.bystander)
    if signed:
        sign(folder)
    return lambda: use(folder, scene.place / "out", whole)


def sign(folder: Path) -> None:
    """The manifest made anew, as whoever changed the files would."""
    from qlora import disk

    old = json.loads((folder / "manifest.json").read_text())
    files = {}
    for name in old["files"]:
        if (folder / name).is_file() and (folder / name).stat().st_size < 1 << 30:  # 64 GiB of nothing among them
            files[name] = {"sha256": disk.sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    manifest = {key: value for key, value in old.items() if key != "sha256"} | {"files": files}
    manifest["sha256"] = disk.sha256_text(json.dumps(manifest, sort_keys=True))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def use(folder: Path, out: Path, whole: bool) -> None:
    """The export of it; unless `whole`, what follows the checks is left out."""
    from qlora import api

    sink = goods.sink()
    options = api.export_options(verify=False)
    if whole:
        api.merge_and_export(folder, to="hf", out=out, options=options, sink=sink)
    else:
        with mock.patch("qlora.export.pipeline.produce", planned):
            api.merge_and_export(folder, to="hf", out=out, options=options, sink=sink)
    sink.close()


def planned(source: Any, *_: Any) -> None:
    """In the place of an export: everything about each tensor is known and fits, and nothing is written."""
    import torch

    list(source.merge("nf4", torch.float32).tensors())


DOOR = Door("adapter", make)
