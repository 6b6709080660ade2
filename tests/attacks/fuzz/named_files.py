"""Inputs whose messages are held word for word (tests/golden/errors.txt): bases, adapters, runs, rows and caches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks import payloads
from tests.attacks.fuzz import adapter_door, base_door, cache_door, nasty, rows_door, run_door
from tests.attacks.fuzz.harness import Scene
from tests.attacks.fuzz.seen import Work
from tests.data.cases import GOOD_LINE

Named = dict[str, Callable[[Scene], Work]]
QUESTION, LOADED, PREPARED = 1.0, 0.1, 0.02  # how far a base is taken
DEEP = "[" * 5000 + "]" * 5000
LONG = "1" * 10_000


def values(file: Path, **keys: Any) -> None:
    """A JSON file with some keys set; None takes a key out."""
    tree = json.loads(file.read_text()) | keys
    nasty.replace(file, nasty.dumped({key: value for key, value in tree.items() if value is not None}))


# --- bases -----------------------------------------------------------------------------------------------------------


def of_base(change: Callable[[Path, Scene], Any], depth: float = QUESTION) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        folder = scene.goods.copy_base(scene.place / "base")
        change(folder, scene)
        return lambda: base_door.use(folder, scene, depth)

    return make


def config(depth: float = QUESTION, **keys: Any) -> Callable[[Scene], Work]:
    return of_base(lambda folder, scene: values(folder / "config.json", **keys), depth)


def weights(data: bytes) -> Callable[[Scene], Work]:
    return of_base(lambda folder, scene: nasty.replace(folder / "model.safetensors", data))


def an_index(shard: str) -> Callable[[Scene], Work]:
    return of_base(lambda folder, scene: payloads.index(folder, shard))


def as_entry(name: str, kind: str) -> Callable[[Scene], Work]:
    return of_base(lambda folder, scene: nasty.entry(folder / name, kind, scene.bystander))


def with_template(text: str) -> Callable[[Scene], Work]:
    return of_base(lambda folder, scene: payloads.template(folder, text), PREPARED)


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
BASES: Named = {
    "no config.json": as_entry("config.json", "gone"),
    "config.json is cut off": of_base(lambda f, s: nasty.replace(f / "config.json", b'{"model_type": "lla')),
    "config.json is nested 5,000 deep": config(x=nasty.Raw(DEEP)),
    "a number of 10,000 digits": config(hidden_size=nasty.Raw(LONG)),
    "hidden_size is 0": config(hidden_size=0),
    "hidden_size is a text": config(hidden_size="64"),
    "a million layers": config(num_hidden_layers=1_000_000),
    "an unknown model": config(model_type="nothing"),
    "an encoder-decoder": config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
    "a class to call": config(_target_="os.system"),
    "quantized by another tool": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "config.json of another shape": config(LOADED, intermediate_size=256),
    "weights as a pickle": of_base(lambda f, s: payloads.only_weights(f, "pytorch_model.bin", b"\x80\x04.")),
    "a pickle called safetensors": weights(b"\x80\x04K\x01."),
    "a header of an exbibyte": weights(nasty.safetensors({"a": ENTRY}, length=1 << 60)),
    "a tensor beyond the end": weights(nasty.safetensors({"a": ENTRY | {"data_offsets": [0, 10**6]}})),
    "an index that leaves the folder": an_index("../../etc/passwd"),
    "an index of a file that is not there": an_index("model-00007-of-00009.safetensors"),
    "the tokenizer is a link out": as_entry("tokenizer.json", "bystander"),
    "config.json is a pipe": as_entry("config.json", "pipe"),
    "no tokenizer": as_entry("tokenizer.json", "gone"),
    "tokenizer.json is empty": of_base(lambda f, s: nasty.replace(f / "tokenizer.json", b"{}")),
    "a template that is none": with_template("{% for m in messages %}"),
    "a template without an end": with_template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
}

# --- adapters --------------------------------------------------------------------------------------------------------


def of_adapter(change: Callable[[Path, Scene], Any], signed: bool = True) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        folder = scene.place / "adapter"
        shutil.copytree(scene.goods.run / "adapter", folder)
        change(folder, scene)
        if signed:
            adapter_door.sign(folder)
        return lambda: adapter_door.use(folder, scene.place / "out", False)

    return make


def peft(**keys: Any) -> Callable[[Scene], Work]:
    return of_adapter(lambda folder, scene: values(folder / "adapter_config.json", **keys))


def provenance(**keys: Any) -> Callable[[Scene], Work]:
    return of_adapter(lambda folder, scene: values(folder / "qlora.json", **keys))


def part(name: str, kind: str) -> Callable[[Scene], Work]:
    return of_adapter(lambda folder, scene: nasty.entry(folder / name, kind, scene.bystander), signed=False)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Scene], Work]:
    """The header of the adapter's tensors changed."""

    def apply(folder: Path, scene: Scene) -> None:
        file = folder / "adapter_model.safetensors"
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        nasty.replace(file, nasty.safetensors(header, raw[8 + size :]))

    return of_adapter(apply)


def flipped(folder: Path, scene: Scene) -> None:
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 1
    file.write_bytes(raw)


def first_b(header: dict[str, Any]) -> str:
    return next(name for name in sorted(header) if "lora_B" in name)


ADAPTERS: Named = {
    "no configuration": part("adapter_config.json", "gone"),
    "no weights": part("adapter_model.safetensors", "gone"),
    "the configuration is a list": of_adapter(lambda f, s: nasty.replace(f / "adapter_config.json", b"[]")),
    "the configuration is cut off": of_adapter(lambda f, s: nasty.replace(f / "adapter_config.json", b'{"peft_ty')),
    "not LoRA": peft(peft_type="IA3"),
    "biases were trained": peft(bias="all"),
    "another rank": peft(r=7),
    "the rank is a text": peft(r="16"),
    "alpha is not finite": peft(lora_alpha=nasty.Raw("NaN")),
    "a pattern without an end": peft(rank_pattern={"(a+)+$": 4}),
    "a pattern that is none": peft(rank_pattern={"(": 4}),
    "patterns in a list": peft(alpha_pattern=["q_proj"]),
    "started from the base's weights": peft(init_lora_weights="pissa"),
    "layers replicated": peft(layer_replication=[[0, 2], [1, 3]]),
    "half a pair": tensors(lambda header: header.pop(first_b(header))),
    "of another base": tensors(lambda header: header.update(extra=header.pop(first_b(header)))),
    "the base is gone": provenance(base="/nowhere/at/all"),
    "the base is a number": provenance(base=7),
    "no quantization that we know": provenance(quantization={"type": "int3"}),
    "a flipped bit": of_adapter(flipped, signed=False),
    "a link out of the folder": part("adapter_model.safetensors", "bystander"),
    "a pipe": part("README.md", "pipe"),
}

# --- runs ------------------------------------------------------------------------------------------------------------

STEP = Path("checkpoints") / "step-000002"


def of_run(
    change: Callable[[Path, Scene], Any], mode: str = "resume", *, whole: bool = False
) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        run = scene.place / "runs" / "tiny"
        shutil.copytree(scene.goods.run, run)
        change(run, scene)
        return lambda: run_door.use(scene, mode, whole)

    return make


def run_entry(name: str, kind: str) -> Callable[[Scene], Work]:
    return of_run(lambda run, scene: nasty.entry(run / name, kind, scene.bystander))


def state(text: bytes | None = None, **keys: Any) -> Callable[[Scene], Work]:
    """Each checkpoint's state.json changed, and signed anew."""

    def apply(run: Path, scene: Scene) -> None:
        for step in sorted((run / "checkpoints").iterdir()):
            if text is not None:
                nasty.replace(step / "state.json", text)
            else:
                values(step / "state.json", **keys)
            adapter_door.sign(step)

    return of_run(apply)


def held(run: Path, scene: Scene) -> None:
    from qlora import lock

    scene.goods.held.append(lock.acquire(run / ".lock"))


def other_recipe(run: Path, scene: Scene) -> None:
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("max_steps = 2", "max_steps = 3"))


def foreign_files(run: Path, scene: Scene) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.txt").write_text("years of work\n")


def a_file(run: Path, scene: Scene) -> None:
    shutil.rmtree(run)
    run.write_text("")


def with_line(line: bytes) -> Callable[[Scene], Work]:
    def apply(run: Path, scene: Scene) -> None:
        lines = (run / "events.jsonl").read_bytes()
        nasty.replace(run / "events.jsonl", lines + line)

    return of_run(apply)


RUNS: Named = {
    "there is none": of_run(lambda run, scene: shutil.rmtree(run)),
    "it is there already": of_run(lambda run, scene: None, "new"),
    "of another recipe": of_run(other_recipe),
    "files of somebody else, anew": of_run(foreign_files, "new"),
    "files of somebody else, --fresh": of_run(foreign_files, "fresh"),
    "a file in its place": of_run(a_file),
    "no recipe": run_entry("recipe.toml", "gone"),
    "the recipe is cut off": of_run(lambda r, s: nasty.replace(r / "recipe.toml", b"[model]\nbase = ")),
    "the recipe is a pipe": run_entry("recipe.toml", "pipe"),
    "the lock is a link": run_entry(".lock", "bystander"),
    "the events are a link": run_entry("events.jsonl", "bystander"),
    "checkpoints/ is a link": run_entry("checkpoints", "bystander"),
    "a flipped bit in the newest": of_run(lambda r, s: (r / STEP / "state.json").write_bytes(b" {}")),
    "the state is no JSON": state(b"{"),
    "the state is a list": state(b"[]"),
    "of another format": state(format=1),
    "a step that is a text": state(state={"step": "2"}),
    "of another base": state(fingerprints={"base": "x", "data": "y"}),
    "the fingerprints are a text": state(fingerprints="x"),
    "an event that is a list": with_line(b"[]\n"),
    "an event of 10,000 digits": with_line(b'{"event": "step", "step": ' + LONG.encode() + b"}\n"),
    "another process has it": of_run(held),
}

# --- rows ------------------------------------------------------------------------------------------------------------


def rows(name: str, data: bytes | str, bad: int = 0, **keys: Any) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        file = scene.place / name
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return lambda: rows_door.use(scene, {"path": str(file), **keys}, False, bad)

    return make


def path_of_rows(path: str) -> Callable[[Scene], Work]:
    return lambda scene: lambda: rows_door.use(scene, {"path": path.replace("HERE", str(scene.place))}, False, 0)


def rows_entry(kind: str) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        nasty.entry(scene.place / "rows.jsonl", kind, scene.bystander)
        return lambda: rows_door.use(scene, {"path": str(scene.place / "rows.jsonl")}, False, 0)

    return make


def columns(**made: Any) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        import pyarrow
        import pyarrow.parquet

        file = scene.place / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.table({name: build(pyarrow) for name, build in made.items()}), file)
        return lambda: rows_door.use(scene, {"path": str(file)}, False, 0)

    return make


ROWS: Named = {
    "no such file": path_of_rows("HERE/row.jsonl"),
    "an empty folder": path_of_rows("HERE"),
    "a pattern without a match": path_of_rows("HERE/**/*.jsonl"),
    "nobody's home": path_of_rows("~no-such-user/rows.jsonl"),
    "an ending that we do not read": rows("rows.xlsx", "PK"),
    "an empty file": rows("rows.jsonl", ""),
    "a pipe": rows_entry("pipe"),
    "a device": rows_entry("device"),
    "a circle of links": rows_entry("loop"),
    "UTF-16": rows("rows.jsonl", GOOD_LINE.encode("utf-16")),
    "Latin-1": rows("rows.jsonl", b'{"text": "caf\xe9"}\n'),
    "a line that is cut off": rows("rows.jsonl", GOOD_LINE + "\n" + GOOD_LINE[:40] + "\n"),
    "a list in a line": rows("rows.jsonl", "[1, 2]\n"),
    "no format fits": rows("rows.jsonl", '{"title": "x", "body": "y"}\n'),
    "a role that nobody has": rows("rows.jsonl", GOOD_LINE.replace('"user"', '"\\u001b[2Juser"') + "\n"),
    "nested 5,000 deep": rows("rows.jsonl", '{"text": ' + DEEP + "}\n"),
    "a number of 10,000 digits": rows("rows.jsonl", '{"text": "a", "n": ' + LONG + "}\n"),
    "an array that is cut off": rows("rows.json", "[" + GOOD_LINE + ",\n" + GOOD_LINE[:30]),
    "a table with a line too long": rows("rows.csv", "text\nx,y,z\n"),
    "no such column": rows("rows.jsonl", '{"text": "a"}\n', columns={"text": "body"}),
    "a pickle called Parquet": rows("rows.parquet", b"\x80\x04K\x01."),
    "bytes in a column of texts": columns(text=lambda pa: pa.array([b"\xff\x00"], pa.binary())),
    "dates in a column of texts": columns(text=lambda pa: pa.array([1], pa.date32())),
}

# --- caches ----------------------------------------------------------------------------------------------------------


def of_cache(change: Callable[[Path, Scene], Any], signed: bool = True) -> Callable[[Scene], Work]:
    def make(scene: Scene) -> Work:
        cache = scene.place / "cache"
        shutil.copytree(scene.goods.cache, cache)
        for folder in sorted((cache / "tokens").iterdir()):
            change(folder, scene)
            if signed and folder.is_dir() and not folder.is_symlink():
                adapter_door.sign(folder)
        return lambda: cache_door.use(scene, str(cache))

    return make


def report(**keys: Any) -> Callable[[Scene], Work]:
    return of_cache(lambda folder, scene: values(folder / "report.json", **keys))


def cached(name: str, kind: str) -> Callable[[Scene], Work]:
    return of_cache(lambda folder, scene: nasty.entry(folder / name, kind, scene.bystander), signed=False)


def somewhere(path: str) -> Callable[[Scene], Work]:
    return lambda scene: lambda: cache_door.use(scene, path)


def with_text(name: str, data: bytes) -> Callable[[Scene], Work]:
    return of_cache(lambda folder, scene: nasty.replace(folder / name, data), signed=name != "manifest.json")


CACHES: Named = {
    "a flipped bit in the tokens": of_cache(
        lambda f, s: nasty.replace(f / "rows.arrow", b"x" + (f / "rows.arrow").read_bytes()[1:]), signed=False
    ),
    "tokens that are no Arrow": with_text("rows.arrow", b"none"),
    "no tokens": cached("rows.arrow", "gone"),
    "no report": cached("report.json", "gone"),
    "no manifest": cached("manifest.json", "gone"),
    "the manifest is cut off": with_text("manifest.json", b'{"files": {'),
    "the manifest is a list": with_text("manifest.json", b"[]"),
    "the manifest is nested 5,000 deep": with_text("manifest.json", DEEP.encode()),
    "the report is a list": with_text("report.json", b"[]"),
    "the report is cut off": with_text("report.json", b"{"),
    "the report counts in words": report(rows="many"),
    "the report has another key": report(evil=1),
    "the report lacks a key": report(rejected=None),
    "the report of 10,000 digits": report(rows=nasty.Raw(LONG)),
    "the tokens are a link out": cached("rows.arrow", "bystander"),
    "the tokens are a pipe": cached("rows.arrow", "pipe"),
    "the report is a pipe": cached("report.json", "pipe"),
    "a file in the folder's place": cached(".", "empty"),
    "a link in the folder's place": cached(".", "bystander"),
    "everybody may write": of_cache(lambda folder, scene: os.chmod(folder, 0o777), signed=False),
    "nobody's home": somewhere("~no-such-user/cache"),
    "a device": somewhere("/dev/null"),
}
