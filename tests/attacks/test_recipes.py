"""Recipes and overrides of strangers, and recipes that are no files: two lines each, of bounded length, and no marker.

What is read of a recipe is bounded before it is parsed; what it asks for is bounded before it is estimated.
"""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.cli import estimate
from qlora.errors import DoesNotFit, QloraError, RecipeError
from qlora.recipe.reading import MOST_PROBLEMS, key_names, load_recipe
from qlora.recipe.sections import parse_bytes

START = '[model]\nbase = "/nowhere"\n[[data.train]]\npath = "rows.jsonl"\n'
LONG = "x" * 500_000
Make = Callable[[Path], Path]


def text(content: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "r.toml").write_bytes(content.encode("utf-8", "surrogatepass"))
        return folder / "r.toml"

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "r.toml")
    return folder / "r.toml"


def link(target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "r.toml").symlink_to(target)
        return folder / "r.toml"

    return make


def sparse(folder: Path) -> Path:
    (folder / "r.toml").touch()
    os.truncate(folder / "r.toml", 1 << 36)
    return folder / "r.toml"


# name: (what makes the file, what the first line says)
FILES: dict[str, tuple[Make, str]] = {
    "a pipe that nobody writes": (pipe, "is not a regular file"),
    "/dev/zero": (link("/dev/zero"), "is not a regular file"),
    "/dev/stdin of another process": (lambda folder: Path("/dev/fd/1000"), "no such recipe"),
    "a folder": (lambda folder: folder, "is a folder"),
    "a link to itself": (link("r.toml"), "levels of symbolic links"),
    "64 GiB": (sparse, "more than 1,000,000 bytes"),
    "a name of 100,000 characters": (lambda folder: folder / LONG[:100_000], "(?i)name too long"),
    "a name with a NUL": (lambda folder: folder / "a\0b.toml", "NUL"),
    "not UTF-8": (lambda folder: (folder / "r.toml").write_bytes(b'a = "\xff"') and folder / "r.toml", "not UTF-8"),  # type: ignore[dict-item,return-value]
    "a NUL": (text(START + 'x = "\0"'), "(?i)illegal character"),
    "a NUL in a string": (text(START + '[output]\ndir = "a\\u0000b"'), "output.dir is wrong: holds a NUL"),
    "a key of 100,000 parts": (text(START + ".".join("a" * 100_000) + " = 1"), "more than 16 parts"),
    "arrays in arrays": (text(START + "x = " + "[" * 10_000), "nested deeper"),
    "tables in tables": (text(START + "x = " + "{a=" * 5_000), "nested deeper"),
    "a number of 10,000 digits": (text(START + "[lora]\nr = " + "9" * 10_000), "more than 200 characters"),
    "a number of 190 digits": (text(START + "[lora]\nr = " + "9" * 190), "lora.r is wrong"),
    "a date as a number": (text(START + "[lora]\nr = 1979-05-27"), "lora.r is wrong"),
    "a key twice": (text(START + "[lora]\nr = 1\nr = 2"), "overwrite"),
    "100,000 keys": (text(START + "[lora]\n" + "".join(f"k{i} = 1\n" for i in range(70_000))), "unknown key lora.k0"),
    "a string of 500 KB": (text(START + f'[lora]\ninit = "{LONG}"'), "lora.init is wrong"),
    "a key of 500 KB": (text(START + f'"{LONG}" = 1'), "unknown key data.train.0.x"),
    "a format of 500 KB": (text(START + f'[export]\nformats = ["{LONG}"]'), "unknown format 'x"),
    "a million formats": (text(START + "[export]\nformats = [" + '"hf",' * 100_000 + "]"), "at most 100 items"),
    "a million targets": (text(START + "[lora]\ntarget_modules = [" + '"a",' * 200_000 + "]"), "at most 4096 items"),
    "100,000 sources": (text(START + '[[data.train]]\npath = "a"\n' * 30_000), "at most 1000 items"),
    "columns of columns": (text(START + "columns = {a = {b = {c = {d = 1}}}}"), "columns.a is wrong"),
    "a home that is nobody's": (text(START.replace("/nowhere", "~no-such-user/base")), "no such home folder"),
    "rows of a home that is nobody's": (text(START.replace("rows", "~no-such-user/rows")), "no such home folder"),
    "runs in a home that is nobody's": (text(START + '[output]\ndir = "~no-such-user"'), "no such home folder"),
    "a base in a circle": (
        lambda folder: os.symlink("loop", folder / "loop") or text(START.replace("/nowhere", "./loop/x"))(folder),
        "circle|levels",
    ),
    "a base of 100,000 characters": (text(START.replace("/nowhere", "./" + LONG[:100_000])), "at most 4096 characters"),
    "a size beyond all": (text(START + '[memory]\nlimit = "999999999999TiB"'), "memory.limit is wrong"),
    "a size of many digits": (text(START + f'[memory]\nlimit = "{"9" * 4000}GiB"'), "memory.limit is wrong"),
    "no memory": (text(START + '[memory]\nlimit = "0GiB"'), "memory.limit is wrong"),
    "control characters": (text(START + '"\\u001b[2J\\u009b" = 1'), "unknown key"),
    "lone surrogates": (text(START + 'x = "\ud800"'), "not UTF-8"),
}  # fmt: skip

# key = value that no bound lets through
VALUES = {
    "lora.r": ("0", "-1", "65537", "1000000000", "1.5", "nan", '"16"x'),
    "lora.alpha": ("0", "inf", "nan", "1e300"),
    "lora.dropout": ("1", "nan", "-0.1"),
    "data.max_length": ("15", "1048577", "1e30"),
    "data.eval_fraction": ("nan", "1", "inf"),
    "data.max_bad_rows": ("-1", "1000000001"),
    "train.epochs": ("0", "inf", "nan", "1e9"),
    "train.max_steps": ("0", "1000000001"),
    "train.max_minutes": ("inf", "nan", "0", "1e9"),
    "train.batch_size": ("0", "1000000000", '"many"'),
    "train.micro_batch_size": ("0", "1000000000"),
    "train.learning_rate": ("1e308", "inf", "nan", "0", "-1"),
    "train.warmup_ratio": ("1", "nan"),
    "train.weight_decay": ("inf", "nan"),
    "train.max_grad_norm": ("inf", "nan", "1e300"),
    "train.neftune_alpha": ("inf", "nan", "1e300"),
    "train.seed": ("-1", "4294967296", "1e400"),
    "checkpoint.every_steps": ("0", "1000000001"),
    "checkpoint.every_minutes": ("0", "inf", "nan"),
    "checkpoint.keep": ("0", "1000000000"),
    "eval.every_steps": ("0", "1000000001"),
    "eval.samples": ("-1", "1000000001"),
    "eval.exact_match_rows": ("-1", "1000000001"),
    "export.max_kl": ("0", "inf", "nan"),
    "data.train.0.weight": ("0", "101", "inf", "nan"),
    "report.sinks": ('["console", "console", "jsonl"]',),
}
OVERRIDES = {
    "nothing": ("", "is not table.key=value"),
    "no value": ("lora.r", "is not table.key=value"),
    "no key": ("=1", "is not table.key=value"),
    "dots": ("....=1", "is not table.key=value"),
    "a key of 50,000 parts": ("a." * 50_000 + "a=1", "is not table.key=value"),
    "an entry of 10,000 digits": ("data.train." + "1" * 10_000 + ".path=x", "there is no entry"),
    "a key of 100,000 characters": ("lora." + LONG[:100_000] + "=1", "unknown key lora.x"),
    "a number of 10,000 digits": ("lora.r=" + "1" * 10_000, "lora.r is wrong"),
    "brackets": ("lora.r=" + "[" * 50_000, "lora.r is wrong"),
    "tables in tables": ("lora.r=" + "{a=" * 30_000, "lora.r is wrong"),
    "dotted keys": ("lora.r={" + ".".join("a" * 40_000) + "=1}", "lora.r is wrong"),
    "a second key": ("lora.r=1\ndropout=0.5", "lora.r is wrong"),
    "a second table": ("lora.r=1\n[train]\nseed=1", "lora.r is wrong"),
    "a pattern": ("lora.(a+)+$=1", "unknown key lora"),
    "a surrogate": ("output.dir=\udcff", "output.dir is wrong"),
    "a value in a value": ("model.base.x=1", "is a value, not a table"),
}


def refused(work: Callable[[], Any]) -> RecipeError:
    with pytest.raises(RecipeError) as error:
        work()
    assert 0 < len(error.value.problems) <= MOST_PROBLEMS + 1
    for problem in error.value.problems:
        assert problem.what and problem.hint
        assert len(problem.where + problem.what + problem.hint) < 1500, problem
    return error.value


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_that_is_none_is_two_lines(tmp_path: Path, name: str) -> None:
    make, what = FILES[name]
    path = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(lambda: load_recipe(path))
    assert re.search(what, error.what), error.what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize("key", VALUES)
def test_values_beyond_any_use_are_refused(tmp_path: Path, key: str) -> None:
    file = text(START)(tmp_path)
    for value in VALUES[key]:
        error = refused(lambda value=value: load_recipe(file, [f"{key}={value}"]))  # type: ignore[misc]
        assert error.problems[0].where.startswith("`overrides`") and error.what.find(f"{key} is wrong") > 0, error.what


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_that_is_none_is_two_lines(tmp_path: Path, name: str) -> None:
    override, what = OVERRIDES[name]
    file = text(START)(tmp_path)
    assert what in refused(lambda: load_recipe(file, [override])).what


def test_of_very_many_problems_the_first_ones_are_said(tmp_path: Path) -> None:
    file = text(START + "[lora]\n" + "".join(f"k{number} = 1\n" for number in range(1000)))(tmp_path)
    problems = refused(lambda: load_recipe(file)).problems
    assert [problem.where for problem in problems[:2]] == [f"{file}:6", f"{file}:7"]
    assert problems[-1].what == "980 more problems"


def test_every_number_of_a_recipe_has_a_bound() -> None:
    """A key that is added without one fails here: none may be infinite, nor as large as one likes."""
    from qlora.recipe.reading import recipe_schema

    definitions = recipe_schema()["$defs"]
    for name in key_names():
        table, *side, key = name.split(".")
        double = {"documents": "DocumentsSection", "own": "QuestionsSection"}
        section = double.get(side[0], "SourceSection") if side else f"{table.capitalize()}Section"
        entry = definitions[section]["properties"][key]
        for branch in entry.get("anyOf", [entry]):
            if branch.get("type") in ("integer", "number"):
                assert {"maximum", "exclusiveMaximum"} & branch.keys(), name
            if branch.get("type") == "string" and "enum" not in branch and "const" not in branch:
                assert "maxLength" in branch, name
            if branch.get("type") == "array":
                assert "maxItems" in branch, name


def test_sizes() -> None:
    assert parse_bytes("1024TiB") == 1 << 50 and parse_bytes(" 7.5 GiB ") == int(7.5 * 2**30)
    for wrong in (
        "1025TiB",
        "0GiB",
        "1" * 100_000 + "B",
        "-1GiB",
        "nanGiB",
        "1e9GiB",
        "",
        "GiB",
        "1" + "0" * 30 + "GiB",
    ):
        assert parse_bytes(wrong) is None, wrong


# --- what is estimated -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families import make_config

    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(make_config("llama").to_dict()))
    return folder


@pytest.mark.parametrize("largest", [["lora.r=65536"], ["train.micro_batch_size=65536", "train.batch_size=65536"]])
def test_the_largest_that_a_recipe_may_ask_for_is_answered(config: Path, largest: list[str]) -> None:
    try:
        assert api.question(api.recipe_or_model(str(config), largest), vram="64GiB").estimate().peak_bytes > 0
    except DoesNotFit as error:
        assert "134,217,728 tokens in one pass" in error.what and "train.micro_batch_size" in error.hint


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--vram", "1" + "0" * 30 + "GiB"], 2),
        (["--vram", "-1"], 2),
        (["--vram", "nan"], 2),
        (["--vram", "0GiB"], 2),
        (["--gpu", "x" * 100_000], 2),
        (["--gpu", ""], 2),
        (["--set", "lora.r=1000000000"], 2),
        (["--vram", "100MiB", "--fit"], 3),
    ],
)
def test_questions_that_are_none(
    config: Path, arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qlora-estimate", str(config), "--json", *arguments])
    with pytest.raises(SystemExit) as end:
        estimate.app()
    out, err = capsys.readouterr()
    assert end.value.code == code and "internal error" not in err and err.count("\n") == 2
    assert len(err) < 1500 and (code == 2 or json.loads(out)["plans"] == [])


@pytest.mark.parametrize(
    "name",
    [
        "~no-such-user",
        "~no-such-user/x.toml",
        "a\0b",
        "x" * 100_000,
        "(a+)+$",
        "owner/name/x/y",
        "../..",
        "",
        "\udcff",
        ".",
    ],
)
def test_names_of_bases_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QloraError) as error:
        api.question(api.recipe_or_model(name), vram="8GiB")
    assert len(error.value.what + error.value.hint) < 1500
