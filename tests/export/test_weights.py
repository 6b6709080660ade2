"""What an export must hold, asked in a child process that may die, and what must lie beside its weights."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from qlora.errors import ExportError
from qlora.export import child
from qlora.export.verify.weights import check_companions, folder_target, reopen
from tests.export.reopened import QUANTS, Case
from tests.families import END_OF_TURN_ID


def test_what_was_written_holds_in_a_child_process(case: Case) -> None:
    targets = {"hf": folder_target(case.folder, torch.bfloat16), **{quant: case.target(quant) for quant in QUANTS}}
    found = reopen(case.merge, targets)
    assert list(found) == list(targets)
    for checks in found.values():
        assert all(check.ok for check in checks), checks
        assert {check.name for check in checks} >= {
            "names, shapes, types",
            "finite",
            "deltas",
            "other weights",
        }
        deltas = next(check.detail for check in checks if check.name == "deltas")
        assert deltas.startswith("14 tensors, ") and json.dumps([asdict(check) for check in checks])


def test_a_child_that_dies_or_hangs_is_an_error_of_two_lines(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="did not end within 0 s") as caught:
        reopen(case.merge, {"hf": folder_target(case.folder, torch.bfloat16)}, limit_seconds=0.1)
    assert caught.value.hint
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ExportError, match=r"verification failed: no message \(exit code 1\)"):
        reopen(case.merge, {})


def test_how_the_child_ends_after_its_answer_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run = child.run
    monkeypatch.setattr(child, "run", lambda *what: replace(run(*what), code=-6))
    found = reopen(case.merge, {"hf": folder_target(case.folder, torch.bfloat16)})
    assert found["hf"] and all(check.ok for check in found["hf"])


def test_companions(case: Case, tmp_path: Path) -> None:
    assert all(check.ok for check in check_companions(case.merge, case.folder, [END_OF_TURN_ID]))
    folder = shutil.copytree(case.folder, tmp_path / "broken")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("1e-06", "1e-05"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").unlink()
    failed = {check.name for check in check_companions(case.merge, folder, [END_OF_TURN_ID + 1]) if not check.ok}
    assert failed == {"config", "tokenizer", "chat template", "end tokens"}
