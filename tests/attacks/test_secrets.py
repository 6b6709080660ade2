"""Tokens reach no output, log, manifest or traceback; files are their owner's to change; no shell is asked."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli import common
from qlora.errors import ModelError
from qlora.events import Notice, Recorder, Rejected, Sinks, StepDone
from tests.attacks.payloads import SECRETS
from tests.export.cases import exported
from tests.runs import run_dir, train, write_recipe


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_no_event_carries_one(armed: None) -> None:
    token = SECRETS["HF_TOKEN"]
    sink = Recorder()
    sinks = Sinks(sink)
    sinks.emit(Notice("hub", f"refused {token}"))
    sinks.emit(Rejected(token, "x", 1, (f"rows.jsonl:1 {token}",)))
    step = StepDone(1, 0.1, 1.0, 1e-4, 1.0, 1, 1, 1.0, 1, 1.0)
    sinks.emit(step)
    assert token not in repr(sink.events) and sink.events[-1] is step


def test_errors_and_crash_files_carry_none(
    armed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    token = SECRETS["HF_TOKEN"]

    def refused() -> None:
        raise ModelError(f"the hub refuses {token}", f"check {token}")

    def crash() -> None:
        raise ZeroDivisionError(f"Authorization: Bearer {token}")

    for work, code in ((refused, 2), (crash, 1)):
        with pytest.raises(SystemExit) as ended:
            common.run(work)
        assert ended.value.code == code
    said = capsys.readouterr()
    assert token not in said.err + said.out and len(said.err.splitlines()) == 4
    (crash_file,) = (tmp_path / "crashes").iterdir()
    assert token not in crash_file.read_text() and "ZeroDivisionError" in crash_file.read_text()
    assert stat.S_IMODE(crash_file.stat().st_mode) == 0o600


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> None:
        raise ModelError("tensor '\x1b]0;owned\x07\x1b[2J' lies\nerror: fake line", "do\r\nnot")

    with pytest.raises(SystemExit):
        common.run(refused)
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\x07" not in error and len(error.strip().splitlines()) == 2


def run_all(tmp_path: Path, recipe: Path, *settings: str) -> str:
    """The command with secrets in its environment; what it said. Its umask lets everybody write."""
    environment = {**os.environ, **SECRETS, "QLORA_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    words = [word for item in settings for word in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "qlora.cli.train", str(recipe), *words],
        capture_output=True, text=True, env=environment, umask=0,
    )  # fmt: skip
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_a_whole_run_and_a_crash_leave_none(tmp_path: Path, llama: Path) -> None:
    """To the end, to an error, to a crash; every file of the run, the cache and the output is searched."""
    recipe = write_recipe(tmp_path, llama)
    rows = recipe.parent / "rows.jsonl"
    settings = ("train.max_steps=2", "train.batch_size=2", "data.max_length=96", "export.formats=['hf']")
    said = run_all(tmp_path, recipe, *settings)
    assert said.startswith("0\n"), said
    said += run_all(tmp_path, recipe, f"model.base={json.dumps('owner/' + SECRETS['HF_TOKEN'])}")
    rows.write_text('{"messages": "' + SECRETS["WANDB_API_KEY"] + '"}\n')
    said += run_all(tmp_path, recipe, "output.dir=" + json.dumps(str(tmp_path / "other")))
    for value in SECRETS.values():
        assert value not in said, said
    searched = 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and path not in (rows,):
            searched += 1
            data = path.read_bytes()
            assert not any(value.encode() in data for value in SECRETS.values()), path
    assert searched > 20
    for folder in (tmp_path / "runs", tmp_path / "cache"):
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o022 == 0, (path, oct(mode))  # nobody else may write, though the umask said so
            assert path.is_dir() or mode in (0o600, 0o644), (path, oct(mode))


NAMED = "hf_PlantedInTheNameOfAFolder0123"  # by its form; the other is a value of the environment
SHORT = ("train.max_steps=1", "train.batch_size=2", "data.max_length=96", "data.eval_fraction=0.2", "lora.r=4")


def test_names_of_folders_that_are_secrets(tmp_path: Path, llama: Path, armed: None) -> None:
    """Only what must find the base again keeps its path, for its owner to read; nothing that is published does."""
    place = tmp_path / f"of {SECRETS['WANDB_API_KEY']}" / NAMED
    shutil.copytree(llama, place / NAMED)
    recipe = write_recipe(place / "work", place / NAMED, name=NAMED)
    told = train(recipe, *SHORT, 'quantization.type="none"', "eval.samples=1")
    run = run_dir(recipe)
    exported(run, to=["hf", "adapter-gguf"])
    secrets = (NAMED.encode(), SECRETS["WANDB_API_KEY"].encode())
    holding = {}
    for place in (run, Path(os.environ["QLORA_CACHE"])):
        for file in place.rglob("*"):
            if file.is_file() and any(secret in file.read_bytes() for secret in secrets):
                holding[file.relative_to(place).as_posix()] = stat.S_IMODE(file.stat().st_mode)
    assert holding == dict.fromkeys(
        ("recipe.toml", "run.json", "adapter/qlora.json", "adapter/adapter_config.json"), 0o600
    )
    assert not any(secret.decode() in repr(told.events) for secret in secrets)
    notices = [event for event in told.events if isinstance(event, Notice) and event.topic == "secrets"]
    assert len(notices) == 1 and "can be read by you alone" in notices[0].message
    train(recipe, *SHORT, 'quantization.type="none"', "eval.samples=1", mode="resume")  # it is found again


HOSTILE = (
    "; touch marker",
    "$(touch marker)",
    "`touch marker`",
    "| touch marker",
    "\n touch marker",
    "&& touch marker",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_word_of_a_recipe_reaches_a_shell(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """As the name of a base, a data file, a column and a folder: errors, or a folder of that odd name."""
    from qlora import api
    from qlora.errors import QloraError
    from qlora.recipe.reading import Recipe, load_recipe

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, llama))
    data = recipe.data.model_copy(update={"train": (recipe.data.train[0].model_copy(update={"path": text}),)})
    for update in (
        {"model": recipe.model.model_copy(update={"base": f"owner/{text}"})},
        {"model": recipe.model.model_copy(update={"base": str(llama), "revision": text}), "data": data},
    ):
        changed: Recipe = recipe.model_copy(update=update)
        with pytest.raises(QloraError):
            api.check(changed)
    assert not list(tmp_path.rglob("marker"))
