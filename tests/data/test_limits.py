"""What is too large is left out before it is rendered or tokenized, and by which reason it is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qlora.data import limits
from qlora.data.chat import ChatTokenizer
from qlora.data.formats import Conversation
from qlora.data.limits import TextLimits, text_limits
from qlora.data.offsets import tokens_of
from qlora.data.prepare import check_files, prepare
from qlora.data.row_json import RowError, RowTooLong
from qlora.errors import DataError
from qlora.events import Recorder, Rejected
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.toys import family_tokenizer


def talk(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


def conversation(*texts: str) -> Conversation:
    return Conversation(tuple(talk(*texts)["messages"]))


def words(chars: int) -> str:
    chance = random.Random(1)
    return " ".join(chance.choice(["alpha", "beta", "now"]) for _ in range(chars // 5))


def test_limits_follow_max_length_the_longest_token_and_what_is_done_with_long_rows() -> None:
    usual = text_limits(2048, "drop", 128)
    assert usual.row_chars == limits.MIN_TEXT_CHARS
    assert usual.rendered_chars == 2 * 2048 * 128 and usual.reason == "over max_length = 2048 tokens"
    assert text_limits(2048, "cut", 128).rendered_chars == 2 * limits.MIN_TEXT_CHARS
    assert text_limits(64, "error", 8).rendered_chars == limits.MIN_SKIPPED_CHARS
    # A token of a million characters, as a stranger's tokenizer may have, raises no limit.
    assert text_limits(2048, "drop", 1_000_000) == TextLimits()
    assert text_limits(1 << 20, "drop", 128).row_chars == 16 << 20


def test_all_text_of_a_row_counts_wherever_it_stands() -> None:
    assert limits.text_chars({"ab": ["c", {"d": "efg"}], "h": (1, None)}) == 2 + 1 + 1 + 3 + 1 + 8
    assert limits.rendered_chars(Conversation(text="abc")) == 3
    one, two = conversation("q", "a" * 100), conversation("q", "a" * 50, "q", "a" * 50)
    assert limits.rendered_chars(two) > 1.4 * limits.rendered_chars(one)


def test_rows_go_together_in_parts_that_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = conversation("q", "a"), conversation("q", "a" * 1000)
    monkeypatch.setattr(limits, "CHUNK_CHARS", 500)
    parts = list(limits.chunks([small, small, small, large, small, large], 2))
    assert [len(part) for part in parts] == [2, 1, 1, 1, 1]
    assert [row for part in parts for row in part] == [small, small, small, large, small, large]
    assert list(limits.chunks([], 2)) == []


def test_so_many_answers_that_rendering_takes_minutes_are_a_bad_row() -> None:
    many = conversation(*["word"] * 20_000)
    with pytest.raises(RowError, match=r"10,000 answers in \d+,\d+ characters are too many"):
        limits.check_size(many, 10_000_000)
    with pytest.raises(RowTooLong):
        limits.check_size(many, 100_000)


@pytest.mark.parametrize("truncation", ["drop", "cut", "error"])
def test_a_huge_row_is_neither_rendered_nor_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncation: str
) -> None:
    """A row of 20 MB took 5.3 GiB and 222 s, only to be dropped."""
    rows = [talk("a", "b"), talk("q", words(3_000_000)), talk("q", words(200_000)), talk("c", "d")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())
    seen = list[int]()

    def watched(tokenizer: Any, texts: list[str]) -> Any:
        seen.extend(map(len, texts))
        return tokens_of(tokenizer, texts)

    monkeypatch.setattr("qlora.data.chat.tokens_of", watched)
    source = (SourceSection(path=str(tmp_path / "a.jsonl")),)
    data, sink = DataSection(train=source, truncation=truncation, max_length=64, eval_fraction=0), Recorder()
    if truncation == "error":
        with pytest.raises(DataError, match=r"a\.jsonl:2: more than 1,048,576 characters .* over data.max_length = 64"):
            prepare(data, "tokenizer", chat, 1, tmp_path / "cache", sink)
        return
    prepared = prepare(data, "tokenizer", chat, 1, tmp_path / "cache", sink)
    cut = truncation == "cut"
    assert list(prepared.train.wheres) == ["a.jsonl:1", *(["a.jsonl:3"] if cut else []), "a.jsonl:4"]
    huge = Rejected("a.jsonl", "more than 1,048,576 characters of text in one row", 1, ("a.jsonl:2",))
    dropped = Rejected("a.jsonl", "over max_length = 64 tokens", 1, ("a.jsonl:3",))
    assert sink.of("rejected") == [huge] if cut else [huge, dropped]
    assert (max(seen) > 200_000) == cut and max(seen) < 1_000_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_row_over_the_readers_limit_is_left_out_like_one_over_max_length(tmp_path: Path, name: str) -> None:
    huge = "x " * (limits.MAX_ROW_BYTES // 2 + 1)
    texts = {
        "a.jsonl": json.dumps({"text": huge}) + '\n{"text": "good"}',
        "a.json": json.dumps([{"text": huge}, {"text": "good"}]),
        "a.csv": f"text\n{huge}\ngood\n",
        "a.txt": huge,
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(texts[name])
    (tmp_path / "data" / "b.txt").write_text("good")
    data = DataSection(train=(SourceSection(path=str(tmp_path / "data")),), eval_fraction=0)
    check_files(data)
    sink, chat = Recorder(), ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())
    assert len(prepare(data, "tokenizer", chat, 1, tmp_path / "cache", sink).train.rows) == (
        1 if name == "a.txt" else 2
    )
    (rejected,) = [event for event in sink.events if isinstance(event, Rejected)]
    assert "over 8 MiB" in rejected.reason and rejected.count == 1
    with pytest.raises(DataError, match="over 8 MiB"):
        check_files(data.model_copy(update={"truncation": "error"}))


def test_a_source_of_nothing_but_huge_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x " * (limits.MAX_ROW_BYTES // 2 + 1))
    with pytest.raises(DataError, match="no rows but 1 that are too long to be read"):
        check_files(DataSection(train=(SourceSection(path=str(tmp_path / "a.txt")),)))
    (tmp_path / "b.jsonl").write_text(json.dumps(talk("q", words(3_000_000))))
    data = DataSection(train=(SourceSection(path=str(tmp_path / "b.jsonl")),))
    chat = ChatTokenizer(family_tokenizer("qwen2"), "assistant", Recorder())
    with pytest.raises(DataError, match=r"no row is left: 1 are far over data\.max_length = 2048 tokens"):
        prepare(data, "tokenizer", chat, 1, tmp_path / "cache", Recorder())
