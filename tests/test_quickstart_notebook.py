"""The quickstart's notebook: what its file holds, and that all of it runs in a kernel."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

import qlora

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "recipes" / "quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
# What a run in CI takes less of; all else is the notebook as it is.
SHORT = ["train.max_steps=12", "eval.every_steps=6", "eval.exact_match_rows=4", "eval.samples=1"]


def test_it_is_a_notebook_without_outputs() -> None:
    read = nbformat.reads(NOTEBOOK.read_text("utf-8"), 4)
    nbformat.validate(read)
    assert (read.nbformat, read.nbformat_minor) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text("utf-8"))


def test_what_it_names_is_there() -> None:
    trees = [ast.parse(source) for source in CODE.values()]
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qlora"
    }
    assert {"check", "estimate_memory", "train", "open_chat", "merge_and_export", "write_report"} <= used
    assert used <= set(qlora.__all__)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and str(node.value).endswith(".toml"):
                assert (NOTEBOOK.parent / node.value).is_file()
    (tagged,) = [cell["id"] for cell in CELLS if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == "settings" and ast.literal_eval(CODE[tagged].splitlines()[-1].partition(" = ")[2]) == []


@pytest.mark.slow
def test_all_of_it_runs_and_draws_itself(tmp_path: Path) -> None:
    """Its own cells in a kernel, in a copy of the folder; fewer steps by the cell that is there for it."""
    from nbclient import NotebookClient

    shutil.copytree(NOTEBOOK.parent / "quickstart", tmp_path / "quickstart")
    shutil.copy(NOTEBOOK.parent / "quickstart.toml", tmp_path)
    notebook = nbformat.reads(NOTEBOOK.read_text("utf-8"), 4)
    next(cell for cell in notebook.cells if cell.id == "settings").source = f"settings = {SHORT}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for cell, found in outputs.items():  # no warning, no line that is not ours
        assert all(output.output_type != "stream" for output in found) or cell == "history", (cell, found)
        assert len(found) <= 2
    texts = {cell: [one.data["text/plain"] for one in found if "data" in one] for cell, found in outputs.items()}
    assert "432 rows to train on" in texts["check"][-1]
    assert "limit" in texts["memory"][0] and "peak" in texts["memory"][0]
    (told,) = texts["train"]
    assert told.count("finished at step 12 of 12") == told.count("evaluation at step 12") == 1
    assert "gradient norm" not in told, "the panel is gone when the run is over"
    assert "<svg" in outputs["curve"][0].data["text/html"]
    assert outputs["history"][0].text.startswith("12 steps, loss ")
    assert "base" in texts["ask"][0] and "tuned" in texts["ask"][0]
    assert "gguf-q8_0" in texts["export"][0] and texts["export"][1].count("mean KL") == 1
    assert "mean KL" not in texts["export"][0]
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
