"""Do two versions behave the same? Records what a clone does, as text; compares two records line by line.

    python tools/same_behaviour.py record before.txt --package ../old-clone
    python tools/same_behaviour.py record after.txt --package .
    python tools/same_behaviour.py compare before.txt after.txt

A record has the sha256 of the quickstart's adapter and optimizer after 24 steps and of what its exports hold, the
JSON of `qlora-estimate` for every recipe, and exit code and message of one input for each entry of the error table.
Only commands are used, so that a version can be compared with one whose modules have other names.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STEPS = 24
# Files that hold weights or the tokenizer: cards name versions and folders.
WEIGHT_ENDINGS = (".safetensors", ".gguf")
GOOD_ROW = {"messages": [{"role": "user", "content": "What is blue?"}, {"role": "assistant", "content": "The sky."}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("file", type=Path)
    record.add_argument("--package", type=Path, default=ROOT, help="the clone whose commands are run")
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    asked = parser.parse_args()
    if asked.command == "record":
        with tempfile.TemporaryDirectory() as place:
            lines = list(Recording(asked.package.resolve(), Path(place)).lines())
        asked.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return
    before, after = (file.read_text(encoding="utf-8").splitlines() for file in (asked.before, asked.after))
    differing = list(difflib.unified_diff(before, after, "before", "after", lineterm="", n=0))
    print("\n".join(differing) or f"{len(before)} lines, all equal")
    sys.exit(1 if differing else 0)


class Recording:
    """One version's commands, run in a folder of their own."""

    def __init__(self, package: Path, place: Path) -> None:
        self.package, self.place = package, place
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(package),
            "QLORA_CACHE": str(place / "cache"),
            "OMP_NUM_THREADS": "2",
            "COLUMNS": "200",
        }

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"qlora.cli.{command}", *arguments],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def lines(self) -> Iterator[str]:
        shutil.copytree(self.package / "recipes", self.place / "recipes")
        yield from self.training()
        yield from self.exports()
        yield from self.estimates()
        yield from self.errors()

    def training(self) -> Iterator[str]:
        done = self.run(
            *("train", "recipes/quickstart.toml", "--set", f"train.max_steps={STEPS}"),
            *("--set", f"checkpoint.every_steps={STEPS}", "--set", "eval.exact_match_rows=0"),
        )
        yield f"train: exit {done.returncode}"
        checkpoint = self.place / "runs" / "quickstart" / "checkpoints" / f"step-{STEPS:06d}"
        for name in ("adapter.safetensors", "optimizer.safetensors"):
            yield f"train: {name} {_sha256(checkpoint / name)}"

    def exports(self) -> Iterator[str]:
        done = self.run(
            "export", "runs/quickstart", *("--to", "hf", "--to", "gguf", "--quant", "q8_0", "--to", "adapter-gguf")
        )
        yield f"export: exit {done.returncode}"
        folder = self.place / "runs" / "quickstart" / "export"
        for file in sorted(path for path in folder.rglob("*") if path.suffix in WEIGHT_ENDINGS):
            yield f"export: {file.relative_to(folder)} {_sha256(file)}"

    def estimates(self) -> Iterator[str]:
        from tests.memory.shapes import SHAPES, config_folder

        for recipe in sorted((self.place / "recipes").glob("*.toml")):
            base = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]["base"]
            folder = config_folder(base, self.place / "configs") if base in SHAPES else recipe.parent / base
            for card in ("8GiB", "24GiB"):
                done = self.run(
                    "estimate", str(recipe), "--set", f"model.base={folder}", "--vram", card, "--json", "--fit"
                )
                told = json.dumps(_rounded(json.loads(done.stdout))) if done.stdout else self._message(done)
                yield f"estimate: {recipe.name} {card}: exit {done.returncode} {told}"

    def errors(self) -> Iterator[str]:
        for name, arguments in self._bad_inputs():
            done = self.run(*arguments)
            yield f"error: {name}: exit {done.returncode} {self._message(done)}"

    def _bad_inputs(self) -> Iterator[tuple[str, list[str]]]:
        bad = self.place / "bad"
        bad.mkdir()
        base = self.place / "recipes" / "quickstart" / "base"
        good = json.dumps(GOOD_ROW)

        def recipe(name: str, rows: str, *lines: str) -> str:
            (bad / f"{name}.jsonl").write_text(rows + "\n", encoding="utf-8")
            head = f'[model]\nbase = "{base}"\n[[data.train]]\npath = "{name}.jsonl"\n[data]\neval_fraction = 0.0\n'
            (bad / f"{name}.toml").write_text(head + "\n".join(lines), encoding="utf-8")
            return str(bad / f"{name}.toml")

        fine = recipe("fine", good)
        yield "no recipe", ["train"]
        yield "missing recipe", ["train", "missing.toml"]
        yield "no TOML", ["train", recipe("toml", good, "[lora")]
        yield "unknown key", ["train", fine, "--set", "lora.rank=8"]
        yield "another trainer's key", ["train", fine, "--set", "train.micro_batch=8"]
        yield "value out of range", ["train", fine, "--set", "train.epochs=-1"]
        yield "two flags", ["train", fine, "--resume", "--fresh"]
        yield "nothing to resume", ["train", fine, "--resume"]
        yield "no such base", ["train", fine, "--set", "model.base=./nowhere"]
        yield "broken row", ["train", recipe("broken", good + '\n{"messages": ')]
        yield "empty messages", ["train", recipe("empty", good + '\n{"messages": []}')]
        yield "unknown columns", ["train", recipe("columns", '{"foo": 1}')]
        yield "no rows file", ["train", fine, "--set", "data.train.0.path=none.jsonl"]
        yield "rows too long", ["train", recipe("long", good), "--set", "data.max_length=4", "--check"]
        yield "unknown layer", ["train", fine, "--set", "lora.target_modules=['q_prj']"]
        yield "does not fit", ["train", fine, "--set", "memory.limit=1MiB"]
        yield "good", ["train", fine, "--check"]
        yield "no adapter", ["export", str(bad)]
        yield "no such run", ["export", "runs/none"]
        yield "foreign folder", ["export", "runs/quickstart", "--out", str(bad)]
        yield "export twice named", ["export", "runs/quickstart", "--to", "gguf", "--quant", "q9_9"]
        yield "holds a run", ["train", "recipes/quickstart.toml"]
        yield "other recipe", ["train", "recipes/quickstart.toml", "--resume", "--set", "train.learning_rate=1e-3"]
        yield "unknown card", ["estimate", fine, "--gpu", "Voodoo 2"]
        yield "two limits", ["estimate", fine, "--gpu", "RTX 4090", "--vram", "8GiB"]
        yield "size without unit", ["estimate", fine, "--vram", "eight"]
        pickles = bad / "pickles"
        shutil.copytree(base, pickles)
        (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
        yield "pickled base", ["train", fine, "--set", f"model.base={pickles}"]
        quantized = bad / "quantized"
        shutil.copytree(base, quantized)
        config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
        (quantized / "config.json").write_text(text, encoding="utf-8")
        yield "quantized base", ["train", fine, "--set", f"model.base={quantized}"]

    def _message(self, done: subprocess.CompletedProcess[str]) -> str:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return " | ".join(lines).replace(str(self.place), "PLACE")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"


def _rounded(value: Any) -> Any:
    """Sizes that depend on the machine's memory of the moment are left out; all others stay exact."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "disk_free_bytes"}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
