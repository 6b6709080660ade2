"""The good things that inputs are made of: a base, a run of it with adapter and checkpoints, cached tokens, rows."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
from hypothesis import strategies as st

from qlora.events import Sink, Sinks
from qlora.recipe.reading import Recipe, load_recipe
from tests.runs import run_dir, train, write_recipe, write_rows

DRAWN = 400
ROWS = 8
SETTINGS = (
    "train.max_steps=2",
    "train.batch_size=2",
    "data.max_length=96",
    "eval.samples=0",
    "checkpoint.every_steps=1",
)
_texts = st.text(max_size=20)
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)),
    max_leaves=6,
)


@dataclass(frozen=True)
class Goods:
    """Folders made once; nobody writes into them. `drawn` are values that hypothesis drew."""

    base: Path
    recipe: Path
    run: Path
    cache: Path
    home: Path
    drawn: list[Any]
    job: Any  # the run's, with its model
    held: list[Any]  # what a child must keep open

    def copy_base(self, folder: Path) -> Path:
        shutil.copytree(self.base, folder)
        return folder

    def loaded(self) -> Recipe:
        return load_recipe(self.recipe, SETTINGS)


def make(folder: Path, seed: int) -> Goods:
    """All of it, in `folder`; the environment is set so that nothing else of this machine is looked at."""
    from tests.families import make_base

    home = folder / "home"
    home.mkdir(parents=True)
    os.environ |= {
        "HOME": str(home),
        "QLORA_CACHE": str(folder / "cache"),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "4000",  # a message is one line
        "TOKENIZERS_PARALLELISM": "false",
    }
    base = make_base("llama", folder / "base")
    recipe = write_recipe(folder / "project", base)
    write_rows(recipe.parent / "rows.jsonl", ROWS)
    train(recipe, *SETTINGS)
    return Goods(base, recipe, run_dir(recipe), folder / "cache", home, drawn_values(seed), _job(recipe), [])


def _job(recipe: Path) -> Any:
    """What a run's loop is given, the model in it."""
    jobs: list[Any] = []

    def keep(job: Any, checkpoint: Any) -> Any:
        jobs.append(job)
        return checkpoint.state

    with mock.patch("qlora.training.loop.run", keep):
        train(recipe, *SETTINGS, mode="resume")
    return jobs[0]


def drawn_values(seed: int) -> list[Any]:
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=DRAWN, deadline=None, database=None, suppress_health_check=[*hypothesis.HealthCheck]
    )
    @hypothesis.given(_values)
    def keep(value: Any) -> None:
        found.append(value)

    keep()
    return found


def sink() -> Sink:
    """What a command would draw on its screen, so that strangers' words in notices are seen there."""
    from qlora.cli.common import Screen
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopRequest

    return Sinks(Screen(ConsoleSink(), StopRequest()))


@cache
def chat_of(base: Path, process: int) -> Any:
    """A chat tokenizer of this process, whose worker that renders templates is kept for the next input."""
    from qlora.data.chat import ChatTokenizer
    from qlora.model.tokenizer import open_tokenizer
    from qlora.model.tokenizer_files import read_files

    with read_files(base).placed() as folder:
        return ChatTokenizer(open_tokenizer(folder, "base"), "assistant", Sinks())
