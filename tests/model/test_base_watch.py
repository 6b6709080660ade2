"""What becomes of a base while it is trained on is seen when the run ends, and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.events import Recorder
from qlora.model.base_watch import BaseWatch
from qlora.model.resolve import resolve
from tests.families import make_base


def cut_short(base: Path) -> None:
    os.truncate(base / "model.safetensors", 1000)


def written_to(base: Path) -> None:
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(base / "model.safetensors", ns=(1, 1))


def another_model(base: Path) -> None:
    shutil.rmtree(base)
    make_base("qwen2", base)


def reconfigured(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (shutil.rmtree, "its folder is gone"),
        (lambda base: (base / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda base: (base / "config.json").unlink(), "there is no config.json"),
        (cut_short, "is cut off"),
        (written_to, "model.safetensors was written to"),
        (another_model, "its config.json is another one"),
        (reconfigured, "its config.json is another one"),
        (lambda base: (base / "chat_template.jinja").write_text("other"), "its tokenizer is another one"),
    ],
)
def test_each_change_is_named(tmp_path: Path, change: Callable[[Path], None], seen: str) -> None:
    base = make_base("llama", tmp_path / "base")
    watch, sink = BaseWatch.begin(resolve(str(base), "main", Recorder())), Recorder()
    watch.report(sink)
    (base / "my-notes.txt").write_text("not of the model")
    watch.report(sink)
    assert not sink.events
    change(base)
    watch.report(sink)
    (notice,) = (event.as_dict() for event in sink.of("notice"))
    assert notice["topic"] == "base" and seen in notice["message"]
    assert "the adapter belongs to the base as it was" in notice["message"]
