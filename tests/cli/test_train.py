"""Whatever a user can get wrong: exit 2, two lines (what and where, what to do), no traceback, nothing damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.cases import expect_two_lines, run, run_in_a_fork
from tests.runs import write_recipe

Break = Callable[[Path, Path], list[str]]


def recipe_text(recipe: Path, old: str, new: str) -> list[str]:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return []


def rows(recipe: Path, text: str) -> list[str]:
    (recipe.parent / "rows.jsonl").write_text(text)
    return []


def base_file(base: Path, name: str, edit: Callable[[dict], dict] | None) -> list[str]:  # type: ignore[type-arg]
    file = base / name
    if edit is None:
        file.unlink()
    else:
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    return []


def pickle_only(base: Path) -> list[str]:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return []


def taken(recipe: Path) -> list[str]:
    run = recipe.parent / "runs" / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text("# written by qlora 0.1.0; every key resolved\n")
    return []


def output_is_a_file(recipe: Path) -> list[str]:
    (recipe.parent / "file").touch()
    return ["--set", f"output.dir={recipe.parent / 'file'}"]


# What is found without torch: message, and how to break a good recipe and base.
QUICK: dict[str, Break] = {
    "no such recipe": lambda recipe, base: ["missing.toml"],
    "not valid TOML": lambda recipe, base: recipe_text(recipe, "[model]", "[model"),
    "unknown key lora.rank": lambda recipe, base: ["--set", "lora.rank=8"],
    "train.epochs is wrong": lambda recipe, base: ["--set", "train.epochs=-1"],
    "no training rows": lambda recipe, base: recipe_text(recipe, '[[data.train]]\npath = "rows.jsonl"', ""),
    "there is no folder": lambda recipe, base: ["--set", "model.base=./nowhere"],
    "rows.jsonl": lambda recipe, base: [str((recipe.parent / "rows.jsonl").unlink() or recipe)],
    "rows.jsonl:1": lambda recipe, base: rows(recipe, '{"messages": \n'),
    "the file is empty": lambda recipe, base: rows(recipe, ""),
    "pickle": lambda recipe, base: pickle_only(base),
    "config.json": lambda recipe, base: base_file(base, "config.json", None),
    "is missing, but the index names it": lambda recipe, base: shard_gone(base),
    "gptq": lambda recipe, base: base_file(
        base, "config.json", lambda c: {**c, "quantization_config": {"quant_method": "gptq"}}
    ),
    "holds a run already": lambda recipe, base: taken(recipe),
    "is a file, the run needs a folder": lambda recipe, base: output_is_a_file(recipe),
    "exclude each other": lambda recipe, base: ["--resume", "--fresh"],
    "no run here to resume": lambda recipe, base: ["--resume"],
}
# What needs the tokenizer.
SLOWER: dict[str, Break] = {
    "no token that ends an answer": lambda recipe, base: no_end_token(base),
    "no row is left: 30 are over": lambda recipe, base: ["--set", "data.max_length=16"],
    "rows.jsonl:1.*16": lambda recipe, base: ["--set", "data.max_length=16", "--set", "data.truncation=error"],
    "rows.jsonl:2": lambda recipe, base: rows(
        recipe, (recipe.parent / "rows.jsonl").read_text().splitlines()[0] + '\n{"messages": []}\n'
    ),
    "train": lambda recipe, base: rows(
        recipe,
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": false}]}\n',
    ),
    "no linear layer 'q_prj'": lambda recipe, base: ["--set", "lora.target_modules=['q_prj']"],
}


def shard_gone(base: Path) -> list[str]:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return []


def no_end_token(base: Path) -> list[str]:
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("eos_token", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return []


def prepared(tmp_path: Path, llama: Path) -> tuple[Path, Path]:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    return write_recipe(tmp_path, base), base


@pytest.mark.parametrize("message", QUICK)
def test_found_before_torch_is_loaded(tmp_path: Path, llama: Path, message: str) -> None:
    recipe, base = prepared(tmp_path, llama)
    extra = QUICK[message](recipe, base)
    arguments = extra if extra and extra[0].endswith(".toml") else [str(recipe), *extra]
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys\nsys.argv = ['qlora-train'] + sys.argv[1:]\nfrom qlora.cli.train import app\n"
        "try:\n    app()\nfinally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    expect_two_lines((done.returncode, done.stdout, done.stderr, 0.0), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("message", SLOWER)
def test_found_before_a_weight_is_read(tmp_path: Path, llama: Path, message: str) -> None:
    recipe, base = prepared(tmp_path, llama)
    expect_two_lines(run_in_a_fork(str(recipe), *SLOWER[message](recipe, base), cwd=tmp_path), message)


def test_several_problems_are_told_at_once(tmp_path: Path, llama: Path) -> None:
    recipe, _ = prepared(tmp_path, llama)
    code, _, error, _ = run(str(recipe), "--set", "lora.rank=8", "--set", "train.epochs=0", cwd=tmp_path)
    assert code == 2 and error.count("error: ") == 2


def test_schema_is_json() -> None:
    code, out, _, _ = run("--schema", cwd=Path.cwd())
    assert code == 0 and json.loads(out)["title"] == "Recipe"
