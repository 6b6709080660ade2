"""What a lesson needs of its base before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora import api
from qlora.errors import TokenizerError
from qlora.recipe.reading import load_recipe
from tests.training.cases import DOCUMENT_KEYS, write_manuals


def test_hard_labels_need_a_chat_template(tmp_path: Path, llama: Path) -> None:
    recipe = write_manuals(tmp_path, without_template(tmp_path, llama))
    with pytest.raises(TokenizerError, match="no chat template") as found:
        api.check(load_recipe(recipe, (*DOCUMENT_KEYS, "study.labels=hard")))
    assert "documents" in found.value.hint
    assert api.check(load_recipe(recipe, DOCUMENT_KEYS)).memory is not None  # soft labels do without one


def without_template(tmp_path: Path, base: Path) -> Path:
    """A copy of a base that was never taught to chat."""
    copy = tmp_path / "plain"
    copy.mkdir()
    for file in base.iterdir():
        if file.suffix == ".jinja":
            continue
        data = file.read_bytes()
        if file.name == "tokenizer_config.json":
            config = json.loads(data)
            config.pop("chat_template", None)
            data = json.dumps(config).encode()
        (copy / file.name).write_bytes(data)
    return copy
