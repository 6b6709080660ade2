"""The counts equal those of plain json and the tokenizer, made on their own, for formats of every kind."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora.data.token_cache import PreparedSplit
from tests.data.xray.cases import chat, pair, prepared, section, seen, sentence, write

SHARED = Path(os.environ.get("QLORA_TEST_DATA", "no-such-folder"))  # real sets, which are not part of the project


def alpaca(row: dict[str, Any]) -> list[dict[str, str]]:
    asked = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def sharegpt(row: dict[str, Any]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def counted(messages: list[dict[str, str]]) -> tuple[int, int]:
    """(tokens, trained) of a ChatML conversation, by the tokenizer alone: an answer is what follows its header."""
    tokenize = chat().tokenizer
    tokens = trained = 0
    for message in messages:
        head = f"<|im_start|>{message['role']}\n"
        ids = tokenize(f"{head}{message['content']}<|im_end|>\n")["input_ids"]
        tokens += len(ids)
        if message["role"] == "assistant":
            trained += len(ids) - len(tokenize(head)["input_ids"]) - len(tokenize("\n")["input_ids"])
    return tokens, trained


FORMATS: dict[str, tuple[list[Any], Any]] = {
    "messages": ([pair(sentence(n), sentence(n + 90, 5 + n)) for n in range(60)], lambda row: row["messages"]),
    "alpaca": (
        [{"instruction": sentence(n), "input": "" if n % 2 else "x y", "output": f"Answer {n}"} for n in range(40)],
        alpaca,
    ),
    "sharegpt": (
        [
            {
                "conversations": [{"from": "human", "value": f"Q {n}?"}, {"from": "gpt", "value": sentence(n)}]
                * (1 + n % 3)
            }
            for n in range(50)
        ],
        sharegpt,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_counts_equal_an_independent_count(name: str, tmp_path: Path) -> None:
    rows, read = FORMATS[name]
    rows = [*rows, rows[0], rows[3]]
    limit = sorted(counted(read(row))[0] for row in rows)[-6]
    path = write(tmp_path / "a.jsonl", [*rows, '{"broken": ', '{"other": 1}'])
    found = seen(tmp_path, section([path], max_length=limit, max_bad_rows=5))
    each = [counted(read(json.loads(line))) for line in Path(path).read_text().splitlines()[: len(rows)]]
    used = [(tokens, trained) for tokens, trained in each if tokens <= limit]
    (source,) = found.sources
    assert (source.rows, source.tokens, source.trained) == (len(used), sum(t for t, _ in used), sum(t for _, t in used))
    assert (source.dropped, source.rejected, source.cut) == (len(each) - len(used), 2, 0)
    assert source.dropped > 0 and source.longest == max(tokens for tokens, _ in each)
    assert {where for reason in source.reasons for where in reason.examples} >= {f"a.jsonl:{len(rows) + 2}"}
    kept = [json.dumps(row) for row, (tokens, _) in zip(rows, each, strict=True) if tokens <= limit]
    assert found.train.copies.count == sum(count - 1 for count in Counter(kept).values())
    assert found.train.longest == max(tokens for tokens, _ in used)
    assert (found.train.ended, found.train.bos) == (len(used), None)
    assert sum(bar.rows for bar in found.lengths if bar.over) == source.dropped
    assert found.packing.share == pytest.approx(source.tokens / (found.packing.packs * limit))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
@pytest.mark.slow
def test_counts_of_real_rows(tmp_path: Path) -> None:
    found = seen(tmp_path, section([str(SHARED / "alpaca_en_demo.json")], max_length=2048))
    each = [counted(alpaca(row)) for row in json.loads((SHARED / "alpaca_en_demo.json").read_text())]
    used = [one for one in each if one[0] <= 2048]
    (source,) = found.sources
    assert (source.rows, source.tokens, source.trained) == (len(used), sum(t for t, _ in used), sum(t for _, t in used))
    assert source.dropped == len(each) - len(used)


def test_cut_rows_are_counted_by_source(tmp_path: Path) -> None:
    """Of two files of one name, in two folders, each has its own counts."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one = write(tmp_path / "a" / "rows.jsonl", [*(pair("One?", sentence(n, 60)) for n in range(3)), "broken"])
    two = write(tmp_path / "b" / "rows.jsonl", [pair("Two?", "Yes."), "broken", pair("x " * 60, "Never learnt.")])
    found = seen(tmp_path, section([one, two], max_length=40, truncation="cut", max_bad_rows=3))
    assert [(s.rows, s.cut, s.dropped, s.rejected) for s in found.sources] == [(3, 3, 0, 1), (1, 0, 1, 1)]
    assert found.train.not_ended.count == 3
    cached = seen(tmp_path, section([one, two], max_length=40, truncation="cut", max_bad_rows=3))
    assert cached.sources == found.sources


def test_questions_with_two_answers(tmp_path: Path) -> None:
    rows = [pair("One?", "Yes."), pair("Two?", "Yes."), pair("One?", "No."), pair("Two?", "Yes.")]
    found = seen(tmp_path, section([write(tmp_path / "a.jsonl", rows)]))
    assert found.train.conflicting.count == 2 and found.train.copies.count == 1
    assert found.train.conflicting.examples == (("a.jsonl:1",), ("a.jsonl:3",))


def test_no_evaluation_rows_no_leaks(tmp_path: Path) -> None:
    found = seen(tmp_path, section([write(tmp_path / "a.jsonl", [pair("One?", "Yes.")])]))
    assert found.eval is None and found.leaks is None and json.dumps(found.as_dict())


def test_every_token_of_a_text_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{sentence(1)}.\n\n{sentence(2)}.\n")
    data = section([str(tmp_path / "a.txt")])
    split: PreparedSplit = prepared(tmp_path, data).train
    found = seen(tmp_path, data)
    assert found.serving.compared == 0 and found.train.trained == sum(split.lengths) - len(split.lengths)
