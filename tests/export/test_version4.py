"""An exported configuration is the same model as before, of every family: old keys stand where they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qlora.export.hf import config_for_both
from qlora.export.version4 import READS_ROPE_THETA
from tests.all_families import DENSE, make_config

# What older keys leave behind as attributes, which nothing of version 5 reads.
LEFT = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
NEW = ("gemma4_text", "lfm3", "ministral3", "qwen3_5_text")


def reopened(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(values))
    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in LEFT}


@pytest.mark.parametrize("family", DENSE)
def test_every_family_opens_as_what_it_was(family: str, tmp_path: Path) -> None:
    make_config(family).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    patched = config_for_both(saved)
    assert reopened(tmp_path, patched) == reopened(tmp_path, saved)
    if family in NEW:
        assert patched == saved
    elif family in READS_ROPE_THETA and saved.get("rope_parameters"):
        assert "rope_theta" in patched
