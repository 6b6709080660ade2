"""Tokens of pairs: two rows each, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.data import judged_rows
from qlora.data.judged import Judged
from qlora.data.limits import TextLimits
from qlora.data.made_rows import RawBatch, RowMaker, packed, unpacked
from qlora.data.prepare import PreparedData, prepare
from qlora.data.row_json import RowError
from qlora.data.token_cache import MadeRow
from qlora.errors import DataError
from qlora.events import Recorder
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import family_chat


def pair(number: int, better: str = "It is a lamp.", worse: str = "It is a pump.") -> dict[str, Any]:
    return {"prompt": f"What is part {number}?", "chosen": better, "rejected": worse}


def prepared(folder: Path, rows: list[dict[str, Any]], format: str = "preference", **keys: Any) -> PreparedData:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=(SourceSection(path=str(folder / "rows.jsonl"), format=format),), **keys)
    recorder = Recorder()
    made = prepare(data, "f", family_chat("qwen2"), 0, folder / "cache", recorder)
    made.__dict__["said"] = recorder
    return made


def test_a_pair_is_two_rows_and_the_worse_one_has_negative_weights() -> None:
    rows = [(f"a.jsonl:{number}", pair(number)) for number in (1, 2)]
    bad = ("a.jsonl:3", pair(3, worse="It is a lamp."))
    maker = RowMaker(family_chat("qwen2"), TextLimits(), 64)
    made = unpacked(packed(maker.made(RawBatch(0, "preference", {}, {}, [*rows, bad], 0, 0))))
    assert [where for where, _ in made.rows] == ["a.jsonl:1"] * 2 + ["a.jsonl:2"] * 2 + ["a.jsonl:3"]
    better, worse = made.rows[0][1], made.rows[1][1]
    assert isinstance(better, MadeRow) and isinstance(worse, MadeRow) and isinstance(made.rows[4][1], RowError)
    assert max(better.weights) == 1 and min(better.weights) == 0
    assert min(worse.weights) == -1 and max(worse.weights) == 0
    assert '"It is a lamp."' in better.prompt and not worse.prompt


def test_answers_of_the_same_tokens_are_no_pair() -> None:
    """Whatever made them differ before the template wrote them."""
    messages = ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "A lamp."})
    ((where, row),) = judged_rows.rows(family_chat("qwen2"), TextLimits(), [("a:1", Judged(messages, worse=messages))])
    assert where == "a:1" and isinstance(row, RowError) and row.reason == judged_rows.SAME


def test_pairs_stay_together_when_rows_are_held_out(tmp_path: Path) -> None:
    data = prepared(tmp_path, [pair(number) for number in range(30)], eval_fraction=0.2)
    for split, count in ((data.train, 48), (data.eval, 12)):
        assert len(split.lengths) == count and split.preference is not None and split.preference.paired
        assert all(split.wheres[row] == split.wheres[row + 1] for row in range(0, count, 2))
        signs = [sum(split.rows[row].loss_weights) > 0 for row in range(count)]
        assert signs == [True, False] * (count // 2)


def test_what_is_left_of_a_pair_over_max_length(tmp_path: Path) -> None:
    long = "It is a lamp, " + "and a lamp, " * 30
    rows = [pair(1), pair(2, better=f"{long} at last.", worse=f"{long} or a pump."), pair(3, worse=long)]
    dropped = prepared(tmp_path / "drop" if (tmp_path / "drop").mkdir() is None else tmp_path, rows, max_length=40)
    assert [where.rpartition(":")[2] for where in dropped.train.wheres] == ["1", "1"]
    (tmp_path / "cut").mkdir()
    cut = prepared(tmp_path / "cut", rows, max_length=40, truncation="cut", max_bad_rows=1, eval_fraction=0.0)
    assert [where.rpartition(":")[2] for where in cut.train.wheres] == ["1", "1", "3", "3"]
    reasons = [event.as_dict()["reason"] for event in cut.__dict__["said"].of("rejected")]
    assert reasons == ["its two answers have the same first 40 tokens"]
    with pytest.raises(DataError, match="same first 40 tokens"):
        (tmp_path / "bad").mkdir()
        prepared(tmp_path / "bad", rows, max_length=40, truncation="cut")


def test_marked_answers_are_rows_by_themselves(tmp_path: Path) -> None:
    rows = [{"prompt": f"Part {n}?", "completion": "A lamp.", "label": n % 3 > 0} for n in range(9)]
    data = prepared(tmp_path, rows, format="kto", eval_fraction=0.0)
    assert data.train.preference is not None and not data.train.preference.paired
    assert [sum(row.loss_weights) > 0 for row in data.train.rows] == [n % 3 > 0 for n in range(9)]


def test_the_demo_of_the_hub_is_read() -> None:
    """LLaMA-Factory's dpo_en_demo: turns, and an answer each that is a turn."""
    from qlora.data.judged import to_judged

    row = {
        "conversations": [{"from": "system", "value": "Teach."}, {"from": "human", "value": "Hi!"}],
        "chosen": {"from": "gpt", "value": "That sounds fun."},
        "rejected": {"from": "gpt", "value": "Hello! I'd be happy to."},
    }
    assert [message["role"] for message in to_judged(row, "preference").messages] == ["system", "user", "assistant"]
