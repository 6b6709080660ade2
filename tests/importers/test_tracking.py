"""What others report to becomes sinks of ours, or is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.importers import tracking
from tests.importers.cases import draft, imported, left, recipe_of

OURS = ["console", "jsonl", "html"]


@pytest.mark.parametrize(
    ("value", "sinks", "lost"),
    [
        ("none", None, ""), (["none"], None, ""), ([], None, ""), ("", None, ""), ("no", None, ""),
        ("wandb", [*OURS, "wandb"], ""), (["tensorboard", "wandb"], [*OURS, "tensorboard", "wandb"], ""),
        ("mlflow, trackio", [*OURS, "mlflow", "trackio"], ""), (["WandB"], [*OURS, "wandb"], ""),
        ("all", None, "every tracker that is installed"), ("comet_ml", None, "no tracker that is known"),
        (["wandb", "neptune", "swanlab"], [*OURS, "wandb"], "no tracker that is known"),
        (["wandb", "wandb"], [*OURS, "wandb"], ""), ({"a": 1}, None, "no tracker that is known"),
        ([["wandb"]], None, "no tracker that is known"), (True, None, "no tracker that is known"),
        ("console", None, "no tracker that is known"),  # no tracker of theirs: not a second one of ours
    ],
)  # fmt: skip
def test_a_name_a_list_or_a_text_with_commas(value: Any, sinks: list[str] | None, lost: str) -> None:
    found = draft()
    tracking.report_to(found, "report_to", value)
    assert found.values.get("report.sinks") == sinks
    assert lost in left(found).get("report_to", "") and bool(left(found)) is bool(lost)
    assert found.accounts, "nothing is silent"


def test_axolotl_s_project_turns_its_tracker_on_and_a_blank_one_does_not(tmp_path: Path) -> None:
    text = "base_model: a/b\nadapter: lora\ndatasets:\n  - path: a/c\n    type: alpaca\n"
    found = imported(tmp_path, text + "wandb_project: mine\nwandb_entity:\nuse_tensorboard: true\nuse_comet: true\n")
    assert recipe_of(found).report.sinks == (*OURS, "wandb", "tensorboard")
    assert {"wandb_project", "use_comet"} <= set(left(found)) and "wandb_entity" not in left(found)
    blank = imported(tmp_path, text + "wandb_project: ''\nmlflow_experiment_name: tries\n")
    assert recipe_of(blank).report.sinks == (*OURS, "mlflow") and "wandb_project" not in left(blank)
