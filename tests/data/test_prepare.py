"""From files to split rows: counts, truncation, the cache and its faults, the evaluation split, and the exits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora import chatml
from qlora.data import prepare as module
from qlora.data.chat import ChatTokenizer
from qlora.data.prepare import PreparedData, check_files, prepare
from qlora.data.token_cache import Prompt
from qlora.errors import DataError
from qlora.events import Notice, Progress, Recorder, Rejected
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import FAMILIES, family_tokenizer, toy_tokenizer


@cache
def chat(family: str = "qwen2", loss_on: str = "assistant") -> ChatTokenizer:
    return ChatTokenizer(family_tokenizer(family), loss_on, Recorder())


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [pair(f"What is {number}?", f"It is {number}.") for number in range(start, start + count)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(
    tmp_path: Path,
    *paths: str,
    sink: Recorder | None = None,
    seed: int = 1,
    using: ChatTokenizer | None = None,
    **settings: Any,
) -> PreparedData:
    data = DataSection(train=tuple(SourceSection(path=path) for path in paths), **settings)
    return prepare(data, "tokenizer", using or chat(), seed, tmp_path / "cache", sink or Recorder())


def of(sink: Recorder, topic: str) -> list[Notice]:
    return [event for event in sink.events if isinstance(event, Notice) and event.topic == topic]


def test_what_the_template_leaves_out_is_said_and_said_again_from_the_cache(tmp_path: Path) -> None:
    thoughtful = pair("What is 1?", "It is 1.")
    thoughtful["messages"][1]["reasoning_content"] = "One is one."
    path = write(tmp_path / "a.jsonl", [thoughtful, *numbered(3, 2)])
    for _ in range(2):
        sink = Recorder()
        run(tmp_path, path, sink=sink, eval_fraction=0)
        (notice,) = of(sink, "reasoning")
        assert notice.count == 1 and notice.message.startswith("1 answers are trained without their reasoning")
    assert of(sink, "cache")


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_come_in_order_with_their_places_sources_and_counts(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", numbered(3)), write(tmp_path / "b.jsonl", numbered(2, 100))]
    data = run(tmp_path, *paths, eval_fraction=0)
    split = data.train
    assert list(split.wheres) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]
    assert list(split.sources) == [0, 0, 0, 1, 1]
    assert len(data.eval.lengths) == 0
    for index, row in enumerate(split.rows):
        assert len(row.input_ids) == split.lengths[index]
        assert sum(row.loss_weights) == split.trained[index]
        assert f"It is {[0, 1, 2, 100, 101][index]}." in chat().tokenizer.decode(row.input_ids)
    assert split.rows[1:3] == [split.rows[1], split.rows[2]]
    assert isinstance(split.lengths[0], int) and isinstance(sum(split.trained), int)


def test_each_row_knows_its_prompt_and_expected_answer(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        pair("What?", "It."),
        {"messages": [*pair("a", "b")["messages"], {"role": "user", "content": "c"}, call], "tools": [tool]},
        {"messages": [*pair("a", "b")["messages"], {"role": "user", "content": "c"}]},
    ]
    data = run(tmp_path, write(tmp_path / "a.jsonl", rows), eval_fraction=0)
    assert data.train.prompt(0) == Prompt([{"role": "user", "content": "What?"}], None, "It.")
    assert data.train.prompt(1) is None  # a call is no answer in words
    assert data.train.prompt(2) == Prompt([{"role": "user", "content": "a"}], None, "b")


def test_plain_text_rows_have_no_prompt(tmp_path: Path) -> None:
    data = run(tmp_path, write(tmp_path / "a.jsonl", [{"text": "a b c"}]), eval_fraction=0)
    assert data.train.prompt(0) is None


def test_formats_are_told_file_by_file_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", numbered(1))
    write(folder / "b.jsonl", [{"instruction": "x", "output": "y"}])
    (folder / "c.txt").write_text("plain")
    sink = Recorder()
    run(tmp_path, str(folder), sink=sink)
    assert [notice.message.split(",")[0] for notice in of(sink, "format")] == [
        "a.jsonl: messages",
        "b.jsonl: alpaca",
        "c.txt: text",
    ]


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    sink = Recorder()
    path = write(tmp_path / "a.jsonl", numbered(600))
    run(tmp_path, path, sink=sink)
    progress = [event for event in sink.events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert len(progress) == 3
    assert progress[-1].done == progress[-1].total == Path(path).stat().st_size


# --- truncation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def long_rows(tmp_path: Path) -> str:
    rows = [pair("What?", "It."), pair("What?", "now " * 100), pair("now " * 100, "It."), pair("Who?", "now " * 200)]
    return write(tmp_path / "long.jsonl", rows)


def test_long_rows_are_dropped_and_counted(tmp_path: Path, long_rows: str) -> None:
    sink = Recorder()
    data = run(tmp_path, long_rows, sink=sink, max_length=64, eval_fraction=0)
    assert list(data.train.wheres) == ["long.jsonl:1"]
    wheres = ("long.jsonl:2", "long.jsonl:3", "long.jsonl:4")
    assert sink.of("rejected") == [Rejected("long.jsonl", "over max_length = 64 tokens", 3, wheres)]


def test_cut_rows_keep_their_start_and_go_where_nothing_trained_is_left(tmp_path: Path, long_rows: str) -> None:
    sink = Recorder()
    whole = run(tmp_path, long_rows, max_length=1000, eval_fraction=0).train
    data = run(tmp_path, long_rows, sink=sink, max_length=64, truncation="cut", eval_fraction=0)
    assert list(data.train.wheres) == ["long.jsonl:1", "long.jsonl:2", "long.jsonl:4"]
    assert data.train.rows[1].input_ids == whole.rows[1].input_ids[:64]
    assert of(sink, "truncation")[0].count == 2
    assert [(event.reason[:26], event.count) for event in sink.events if isinstance(event, Rejected)] == [
        ("nothing trained is left of", 1)
    ]


def test_a_long_row_can_be_an_error(tmp_path: Path, long_rows: str) -> None:
    with pytest.raises(DataError, match=r"long.jsonl:2: the row has 1\d\d tokens, over data.max_length = 64"):
        run(tmp_path, long_rows, max_length=64, truncation="error")


def test_no_row_left_says_how_many_and_how_long(tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [pair("What?", "now " * count) for count in (50, 100, 200)])
    with pytest.raises(DataError) as caught:
        run(tmp_path, path, max_length=32)
    assert "3 are over data.max_length = 32 tokens" in caught.value.what
    longest, half = map(int, re.findall(r"longest has (\d+), half of them (\d+)", caught.value.what)[0])
    assert 200 < longest < 230 and 100 < half < 130
    assert "raise data.max_length" in caught.value.hint


def test_nothing_but_bad_rows_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row is left to use \(2 are bad, 2 of them because messages\[1\]: "):
        run(tmp_path, write(tmp_path / "a.jsonl", [pair("a", ""), pair("b", "")]), max_bad_rows=5)


# --- the evaluation split -----------------------------------------------------------------------------------------


def test_a_share_of_the_rows_is_held_out_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(100))
    splits = {seed: run(tmp_path, path, seed=seed, eval_fraction=0.1) for seed in (1, 2)}
    for data in splits.values():
        assert (len(data.train.lengths), len(data.eval.lengths)) == (90, 10)
        assert not set(data.train.wheres) & set(data.eval.wheres)
        assert len(set(data.train.wheres) | set(data.eval.wheres)) == 100
    assert list(splits[1].eval.wheres) != list(splits[2].eval.wheres)
    assert list(splits[1].eval.wheres) == list(run(tmp_path, path, seed=1, eval_fraction=0.1).eval.wheres)
    assert splits[1].fingerprint != splits[2].fingerprint


def test_equal_rows_never_straddle_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(20) * 3)
    for seed in range(8):
        data = run(tmp_path, path, seed=seed, eval_fraction=0.2)
        texts = [{tuple(row.input_ids) for row in split.rows} for split in (data.train, data.eval)]
        assert not texts[0] & texts[1]
        assert len(data.eval.lengths) == 12


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (40, 0, 0), (40, 0.9, 36)]
)
def test_how_many_rows_are_held_out(tmp_path: Path, rows: int, fraction: float, held_out: int) -> None:
    data = run(tmp_path, write(tmp_path / "a.jsonl", numbered(rows)), eval_fraction=fraction)
    assert (len(data.train.lengths), len(data.eval.lengths)) == (rows - held_out, held_out)


def test_a_row_with_many_copies_does_not_take_over_the_evaluation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(1) * 50 + numbered(20, 1))
    for seed in range(8):
        assert len(run(tmp_path, path, seed=seed, eval_fraction=0.1).eval.lengths) == 7
    few = write(tmp_path / "b.jsonl", numbered(1) * 50 + numbered(1, 1) * 20)
    assert len(run(tmp_path, few, eval_fraction=0.1).eval.lengths) == 20


def test_nothing_but_copies_can_be_split_all_the_same(tmp_path: Path) -> None:
    data = run(tmp_path, write(tmp_path / "a.jsonl", numbered(1) * 5), eval_fraction=0.5)
    assert (len(data.train.lengths), len(data.eval.lengths)) == (4, 1)


def test_evaluation_sources_are_taken_whole(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "a.jsonl", numbered(9)), write(tmp_path / "b.jsonl", numbered(4, 50))
    data = run(tmp_path, train, eval=(SourceSection(path=evaluation),))
    assert (len(data.train.lengths), len(data.eval.lengths)) == (9, 4)
    assert data.eval.wheres[0] == "b.jsonl:1"


# --- the cache ----------------------------------------------------------------------------------------------------


def test_the_second_run_reads_the_cache_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*numbered(5), pair("a", "now " * 100)]
    path = write(tmp_path / "a.jsonl", rows)
    first, second = Recorder(), Recorder()
    data = run(tmp_path, path, sink=first, max_length=64)
    monkeypatch.setattr(ChatTokenizer, "encode_many", lambda *_: pytest.fail("tokenized again"))
    again = run(tmp_path, path, sink=second, max_length=64)
    assert again.fingerprint == data.fingerprint
    assert list(again.train.rows) == list(data.train.rows)
    said = [event for event in first.events if not isinstance(event, Progress)]
    assert second.events[1:] == said
    assert of(second, "cache")[0].count == 5


def test_everything_that_makes_rows_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", numbered(4))
    seen: dict[str, str] = {}

    def fresh(name: str, fingerprint: str = "tokenizer", using: ChatTokenizer | None = None, **settings: Any) -> None:
        sink = Recorder()
        source = SourceSection(path=path, **settings.pop("source", {}))
        data = DataSection(train=(source,), **settings)
        seen[name] = prepare(data, fingerprint, using or chat(), 1, tmp_path / "cache", sink).fingerprint
        assert not of(sink, "cache"), f"{name} was taken from the cache"

    fresh("first")
    fresh("tokenizer", fingerprint="other")
    fresh("loss_on", using=chat(loss_on="all"), loss_on="all")
    fresh(
        "template",
        using=ChatTokenizer(toy_tokenizer(FAMILIES["qwen2"], chatml.template("<|im_end|>")), "assistant", Recorder()),
    )
    fresh("max_length", max_length=1024)
    fresh("truncation", truncation="cut")
    fresh("max_bad_rows", max_bad_rows=1)
    fresh("format", source={"format": "messages"})
    monkeypatch.setattr(module, "CODE_VERSION", module.CODE_VERSION + 1)
    fresh("code")
    write(Path(path), numbered(4, 1))
    fresh("contents")
    assert len(set(seen.values())) == len(seen)


def test_the_content_is_known_again_whatever_made_it_and_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other libraries, settings or folders make another key, but only other rows are other content."""
    (tmp_path / "here").mkdir()
    path = write(tmp_path / "here" / "a.jsonl", numbered(9))
    other = write(tmp_path / "b.jsonl", numbered(9, 1))
    base = run(tmp_path, path, eval_fraction=0.3)
    monkeypatch.setattr(module, "version", lambda name: "99.0")
    upgraded = run(tmp_path, path, eval_fraction=0.3)
    longer = run(tmp_path, path, eval_fraction=0.3, max_length=1024)
    assert len({base.fingerprint, upgraded.fingerprint, longer.fingerprint}) == 3
    assert base.content_fingerprint == upgraded.content_fingerprint == longer.content_fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    moved, sink = str(tmp_path / "there" / "a.jsonl"), Recorder()
    again = run(tmp_path, moved, sink=sink, eval_fraction=0.3)
    assert (again.fingerprint, again.content_fingerprint) == (upgraded.fingerprint, base.content_fingerprint)
    assert "read from" in of(sink, "cache")[0].message
    halves = [write(tmp_path / f"{name}.jsonl", numbered(3, start)) for name, start in (("c", 0), ("d", 3), ("e", 6))]
    changed = [
        run(tmp_path, moved, eval_fraction=0.3, seed=2),  # other rows are held out
        run(tmp_path, moved, eval_fraction=0),
        run(tmp_path, other, eval_fraction=0.3),
        run(tmp_path, *halves, eval_fraction=0.3),  # the same tokens, but of three sources
        run(tmp_path, *halves[::-1], eval_fraction=0.3),
        run(tmp_path, moved, eval=(SourceSection(path=other),)),
        run(tmp_path, moved, using=chat(loss_on="all"), loss_on="all", eval_fraction=0.3),  # other weights
    ]
    assert len({base.content_fingerprint, *(data.content_fingerprint for data in changed)}) == len(changed) + 1


@pytest.mark.parametrize("fault", ["flip", "cut", "remove", "no manifest", "no report"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, fault: str) -> None:
    path = write(tmp_path / "a.jsonl", numbered(5))
    before = run(tmp_path, path)
    rows = list(before.train.rows)
    (file,) = (tmp_path / "cache").rglob("rows.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "flip":
        file.write_bytes(content)
    elif fault == "cut":
        file.write_bytes(content[:-100])
    else:
        names = {"remove": "rows.arrow", "no manifest": "manifest.json", "no report": "report.json"}
        (file.parent / names[fault]).unlink()
    sink = Recorder()
    after = run(tmp_path, path, sink=sink)
    assert "tokenizing anew" in of(sink, "cache")[0].message
    assert list(after.train.rows) == rows and after.fingerprint == before.fingerprint
    assert not of(Recorder(), "cache")


def test_a_failed_tokenization_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*numbered(600), pair("a", "")])
    with pytest.raises(DataError, match=r"a.jsonl:601"):
        run(tmp_path, path)
    assert not [place for place in (tmp_path / "cache").rglob("*") if place.is_file()]


def test_without_a_cache_rows_are_made_for_this_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    (tmp_path / "private").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    sink = Recorder()
    data = run(tmp_path, write(tmp_path / "a.jsonl", numbered(2)), sink=sink, eval_fraction=0)
    assert len(data.train.rows) == 2 and "It is 1." in chat().tokenizer.decode(data.train.rows[1].input_ids)
    assert (
        "cannot be looked at (Not a directory): rows are tokenized anew, for this run" in of(sink, "cache")[0].message
    )
    assert not list((tmp_path / "private").iterdir())


def test_rows_that_can_be_written_nowhere_are_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="cannot write tokenized rows") as caught:
        run(tmp_path, write(tmp_path / "a.jsonl", numbered(2)))
    assert "QLORA_CACHE" in caught.value.hint


# --- before anything heavy ----------------------------------------------------------------------------------------


def test_files_are_checked_without_torch_or_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(2))
    program = f"""
import sys
from qlora.data.prepare import check_files
from qlora.recipe.sections import DataSection, SourceSection
check_files(DataSection(train=(SourceSection(path={path!r}),)))
assert not {{"torch", "transformers", "datasets", "pyarrow", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_only_the_first_rows_are_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*numbered(module.CHECKED_ROWS), pair("a", "")])
    check_files(DataSection(train=(SourceSection(path=path),)))


def test_evaluation_files_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(2))
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such file"):
        check_files(DataSection(train=(SourceSection(path=path),), eval=(SourceSection(path=missing),)))
