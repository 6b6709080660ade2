"""The trained prompt is the served one; where it is not, the row is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora.data.token_cache import PreparedSplit
from qlora.data.xray import serving, tokens
from tests.data.xray.cases import chat, pair, prepared, section, write


def compared(split: PreparedSplit) -> serving.Serving:
    facts, _ = tokens.look(split, tokens.Ids.of(chat()))
    return serving.compare(split, facts, chat())


def test_rows_train_after_the_served_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "COMPARED", 20)
    rows = [pair(f"What is {n}?", f"It is {n}.") for n in range(30)]
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", rows)])).train
    assert compared(split) == serving.Serving(20, 30, ())
    asked = chat().tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True)["input_ids"]
    facts, _ = tokens.look(split, tokens.Ids.of(chat()))
    assert split.rows[0].input_ids[: facts.starts[0]] == asked


def test_another_prompt_is_named(tmp_path: Path) -> None:
    split = prepared(tmp_path, section([write(tmp_path / "a.jsonl", [pair("One?", "1."), pair("Two?", "2.")])])).train
    other = replace(split, prompts=[split.prompts[0], split.prompts[1].replace("Two?", "Too?")])
    assert compared(other).differ == ("a.jsonl:2",)
