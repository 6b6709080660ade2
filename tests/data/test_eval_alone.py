"""Rows to evaluate on beside documents alone."""

from __future__ import annotations

import json
from pathlib import Path

from qlora.data import eval_alone
from qlora.data.prepare import NO_ROWS
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import GOOD
from tests.study.cases import chat


def test_rows_to_evaluate_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    data = DataSection(eval=(SourceSection(path=str(tmp_path / "rows.jsonl")),))
    made = eval_alone.prepared(data, "tokenizer", chat(), tmp_path / "cache", Recorder())
    assert not made.train.lengths and len(made.eval.lengths) == 2 and all(made.eval.trained)
    assert made.content_fingerprint and made.fingerprint
    assert eval_alone.prepared(DataSection(), "tokenizer", chat(), tmp_path / "cache", Recorder()) is NO_ROWS
