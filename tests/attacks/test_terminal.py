"""Whole commands under a pseudo-terminal: what strangers wrote is seen, and steers nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attacks.terminals import HOSTILE, command, foreign_controls, under_terminal, with_streams

BASE = "[bold]base[-bold] [link=x]"
TRAIN = (
    *("train.max_steps=2", "train.batch_size=2", "data.max_length=512", "data.eval_fraction=0.2", "eval.every_steps=1"),
    *("eval.samples=1", "lora.r=4", 'memory.limit="8GiB"'),
)


def world(folder: Path, llama: Path, name: str = "[bold]run[-bold]") -> Path:
    """A recipe in a folder with a hostile name; base, rows, columns and configuration keys have hostile texts too."""
    place = folder / HOSTILE
    shutil.copytree(llama, base := folder / BASE)  # an export takes no base whose path has control characters
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, f"key {HOSTILE}": 1, "quality": HOSTILE}))
    turns = [("user", f"What {HOSTILE}?"), ("assistant", f"It {HOSTILE}.")]
    good = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows: list[object] = [good] * 12
    rows += [{"messages": HOSTILE}, {f"column {HOSTILE}": 1}]
    file = place / f"rows{HOSTILE}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = place / f"{name}.toml"
    paths = [json.dumps(str(path)) for path in (base, file, place / "runs")]
    recipe.write_text(
        f"[model]\nbase = {paths[0]}\n[data]\nmax_bad_rows = 5\n[[data.train]]\npath = {paths[1]}\n"
        f"[output]\ndir = {paths[2]}\n"
    )
    return recipe


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def expect(output: bytes, code: int, wanted: int, seen: bool = True) -> None:
    """The exit code, and that the payload is on the screen as text and nowhere as itself."""
    text = output.decode(errors="replace")
    assert code == wanted, text
    assert foreign_controls(output) == [], text
    assert "internal error" not in text and "Traceback" not in text, text
    assert not seen or "\u241b]0;owned\u2407" in "".join(text.split()), text


def whole_commands(recipe: Path) -> list[tuple[str, list[str]]]:
    run = recipe.parent / "runs" / recipe.stem
    return [
        ("train", [str(recipe), *words(*TRAIN)]),
        ("export", [str(run), "--no-verify"]),
        ("estimate", [str(recipe)]),
    ]


def test_train_export_and_estimate(tmp_path: Path, llama: Path) -> None:
    recipe = world(tmp_path, llama)
    for name, arguments in whole_commands(recipe):
        code, output = under_terminal(command(name, *arguments))
        expect(output, code, 0, seen=name != "estimate")
    for file in recipe.parent.joinpath("runs").rglob("*"):
        if file.suffix in (".jsonl", ".md") or file.name in ("export.json", "Modelfile"):
            assert foreign_controls(file.read_bytes()) == [], file


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "settings"), [(40, {}), (200, {"NO_COLOR": "1"}), (80, {"TERM": "dumb"})])
def test_terminals_of_each_kind(tmp_path: Path, llama: Path, columns: int, settings: dict[str, str | None]) -> None:
    recipe = world(tmp_path, llama)
    run = recipe.parent / "runs" / recipe.stem
    more: list[tuple[str, list[str]]] = [
        ("train", [str(recipe), *words(*TRAIN), "--resume"]),
        ("train", [str(recipe), *words(*TRAIN), "--fresh"]),
        ("train", [str(recipe), *words(*TRAIN), "--check"]),
        ("export", [str(run), "--no-verify", "--json", "--to", "gguf"]),
        ("estimate", [str(recipe), "--json"]),
        ("estimate", [str(recipe), "--fit", "--vram", "12GiB"]),
    ]
    for name, arguments in [*whole_commands(recipe), *(more if columns == 40 else [])]:
        code, output = under_terminal(command(name, *arguments), columns, settings)
        expect(output, code, 0, seen=False)
        assert settings.get("TERM", "xterm") != "dumb" or b"\x1b" not in output
        assert "NO_COLOR" not in settings or not re.search(rb"\x1b\[[0-9;]*3[0-9]", output)


@pytest.mark.slow
def test_a_pipe_gets_lines_of_text_alone(tmp_path: Path, llama: Path) -> None:
    recipe = world(tmp_path, llama)
    out, error = tmp_path / "out", tmp_path / "err"
    for name, arguments in whole_commands(recipe):
        assert with_streams(command(name, *arguments), {1: str(out), 2: str(error)}) == 0
    assert foreign_controls(out.read_bytes()) == [] and b"\x1b" not in out.read_bytes() and not error.read_bytes()


Error = Callable[[Path], tuple[str, list[str]]]  # changes a good world; the command and its arguments


def base_of(recipe: Path) -> Path:
    return recipe.parents[len(Path(HOSTILE).parts)] / BASE


def changed(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def rows_of(recipe: Path, text: str) -> tuple[str, list[str]]:
    (recipe.parent / f"rows{HOSTILE}.jsonl").write_text(text)
    return "train", [str(recipe), "--check"]


def template_of(recipe: Path, text: str) -> tuple[str, list[str]]:
    (base_of(recipe) / "chat_template.jinja").write_text(text)
    return "train", [str(recipe), "--check"]


def config_of(recipe: Path, **keys: object) -> tuple[str, list[str]]:
    changed(base_of(recipe) / "config.json", **keys)
    return "estimate", [str(recipe)]


def adapter_of(recipe: Path, **keys: object) -> tuple[str, list[str]]:
    folder = recipe.parent / f"adapter{HOSTILE}"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **keys}))
    return "export", [str(folder)]


def tokenizer_of(recipe: Path, **keys: object) -> tuple[str, list[str]]:
    changed(base_of(recipe) / "tokenizer_config.json", **keys)
    return "train", [str(recipe), "--check"]


def toml_of(recipe: Path, text: str) -> tuple[str, list[str]]:
    recipe.write_text(recipe.read_text() + text)
    return "train", [str(recipe)]


def run_of(recipe: Path, _: None = None) -> tuple[str, list[str]]:
    run = recipe.parent / "runs" / recipe.stem
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(f"[model]\n{json.dumps(HOSTILE)} = 1\n")
    return "train", [str(recipe), "--resume"]


ERRORS: dict[str, Error] = {
    "an option": lambda recipe: ("train", [f"--{HOSTILE}"]),
    "an option's value": lambda recipe: ("export", ["x", "--quant", HOSTILE]),
    "a number": lambda recipe: ("export", ["x", "--max-kl", HOSTILE]),
    "too many arguments": lambda recipe: ("train", [str(recipe), HOSTILE, HOSTILE]),
    "a card": lambda recipe: ("estimate", [str(recipe), "--gpu", HOSTILE]),
    "a size": lambda recipe: ("estimate", [str(recipe), "--vram", HOSTILE]),
    "a recipe that is not there": lambda recipe: ("train", [f"{recipe}{HOSTILE}.toml"]),
    "a model that is not there": lambda recipe: ("estimate", [HOSTILE]),
    "a run that is not there": lambda recipe: ("export", [HOSTILE]),
    "a place for a plot": lambda recipe: ("estimate", [str(recipe), "--plot", f"{recipe}/{HOSTILE}"]),
    "a key of --set": lambda recipe: ("train", [str(recipe), "--set", f"lora.{HOSTILE}=1"]),
    "a value of --set": lambda recipe: ("train", [str(recipe), "--set", f"lora.r={HOSTILE}"]),
    "an unknown key": lambda recipe: toml_of(recipe, f"[lora]\n{json.dumps(HOSTILE)} = 1\n"),
    "an unknown table": lambda recipe: toml_of(recipe, f"[{json.dumps(HOSTILE)}]\n"),
    "a wrong value": lambda recipe: toml_of(recipe, f"[train]\noptimizer = {json.dumps(HOSTILE)}\n"),
    "TOML that is none": lambda recipe: toml_of(recipe, f"[lora\n{HOSTILE}"),
    "rows that are no JSON": lambda recipe: rows_of(recipe, f"{HOSTILE}\n" * 9),
    "rows of a kind nobody knows": lambda recipe: rows_of(recipe, json.dumps({HOSTILE: HOSTILE}) + "\n"),
    "a role": lambda recipe: rows_of(recipe, json.dumps({"messages": [{"role": HOSTILE, "content": "x"}]}) + "\n"),
    "a template's own error": lambda recipe: template_of(recipe, "{{ raise_exception('" + HOSTILE + "') }}"),
    "a template's syntax": lambda recipe: template_of(recipe, "{% " + HOSTILE + " %}"),
    "a template's name": lambda recipe: template_of(recipe, "{{ undefined['" + HOSTILE + "'].x }}"),
    "a model type": lambda recipe: config_of(recipe, model_type=HOSTILE, architectures=[HOSTILE]),
    "a configuration's value": lambda recipe: config_of(recipe, hidden_size=HOSTILE),
    "an activation": lambda recipe: config_of(recipe, hidden_act=HOSTILE),
    "a key that chooses code": lambda recipe: config_of(recipe, **{HOSTILE: {"_target_": HOSTILE}}),
    "an end token": lambda recipe: tokenizer_of(recipe, eos_token=HOSTILE),
    "an adapter's base": lambda recipe: adapter_of(recipe, base_model_name_or_path=HOSTILE),
    "an adapter's type": lambda recipe: adapter_of(recipe, peft_type=HOSTILE),
    "another run's recipe": run_of,
}


# Those for which no library has to be asked.
QUICK = {name for name in ERRORS if re.search("option|number|arguments|recipe|run that|key|value|table|TOML", name)}
QUICK -= {"a configuration's value", "a key that chooses code"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ERRORS]
)
def test_errors(tmp_path: Path, llama: Path, name: str) -> None:
    command_name, arguments = ERRORS[name](world(tmp_path, llama))
    code, output = under_terminal(command(command_name, *arguments), columns=200)
    expect(output, code, 2, seen=False)
    assert len(output.splitlines()) >= 2
