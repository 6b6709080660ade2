"""Special tokens in the text of rows: as they are in conversations and rendered texts, broken up in documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.data.control_tokens import broken_up, told
from qlora.data.formats import Conversation
from qlora.data.limits import TextLimits
from qlora.data.made_rows import RawBatch, RowMaker
from qlora.data.prepare import prepare
from qlora.data.unread import BROKEN, CONTROL, RENDERED, TAUGHT, Remark
from qlora.events import Recorder
from qlora.recipe.sections import DataSection
from tests.data.shapes import shape_chat
from tests.study.cases import chat

END, START = "<|im_end|>", "<|im_start|>"


def talk(question: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def test_a_row_without_special_tokens_is_the_very_same() -> None:
    for row in (talk("What is <b> and [1]?", "<think>\nbold\n</think>\nBold."), Conversation(text="a < b | c")):
        for is_document in (False, True):
            assert told(chat(), row, is_document) is row


def test_a_conversation_is_left_as_it_is_and_said() -> None:
    row = told(chat(), talk(f"What does {END} mean? And {END}{START}?", f"{START} begins a turn."), False)
    assert row == talk(f"What does {END} mean? And {END}{START}?", f"{START} begins a turn.")
    assert row.remarks == (Remark(TAUGHT, START), Remark(CONTROL, END), Remark(CONTROL, START))


def test_an_answer_that_is_context_teaches_nothing() -> None:
    context = {"role": "assistant", "content": f"{START} begins a turn.", "train": False}
    row = told(chat(), Conversation((*talk("A?", "B.").messages, {"role": "user", "content": "C?"}, context)), False)
    assert row.remarks == (Remark(CONTROL, START),)


def test_a_rendered_text_keeps_its_tokens_and_a_document_has_none() -> None:
    text = f"{START}user\nHi{END}\n"
    rendered, document = (told(chat(), Conversation(text=text), is_document) for is_document in (False, True))
    assert rendered.text == text and rendered.remarks == (Remark(RENDERED, END), Remark(RENDERED, START))
    assert document.text == broken_up(chat(), text) != text and {one.kind for one in document.remarks} == {BROKEN}
    (row,) = chat().encode_many([document])
    special = set(chat().tokenizer.convert_tokens_to_ids([START, END]))
    assert not special & set(row.input_ids[:-1])  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", ["qwen3", "llama31", "mistral_v03", "gpt_oss", "gemma3"])
def test_what_is_trained_is_what_a_server_reads(shape: str) -> None:
    """Of a question with a special token in it, whose text the template writes as it stands."""
    of = shape_chat(shape)
    token = next(str(one) for one in of.tokenizer.added_tokens_decoder.values() if one.special)
    row = told(of, talk(f"What is {token}?", "A token."), False)
    (made,) = of.encode_many([row])
    served = of.prompt_ids(row.messages[:1], None)
    assert made.input_ids[: len(served)] == served and Remark(CONTROL, token) in row.remarks  # type: ignore[union-attr]


def test_batches_of_documents_are_broken_up() -> None:
    rows = [("m.md:1", {"text": f"The turn ends with {END}."})]
    made = [
        RowMaker(chat(), TextLimits(), 100).made(RawBatch(0, format, {}, {}, rows, 1, 1, True))
        for format in ("documents", "text")
    ]
    lengths = [len(batch.rows[0][1].ids) for batch in made]  # type: ignore[union-attr]
    assert lengths[0] > lengths[1]
    assert [kind for batch in made for _, remarks in batch.remarks for kind, _ in remarks] == [BROKEN, RENDERED]


def test_they_are_said_once_a_file_with_their_rows(tmp_path: Path) -> None:
    lines = [
        {"messages": list(talk(f"What is {END}?", "It ends.").messages)},
        {"messages": list(talk(f"And {END}?", f"So does {START}.").messages)},
        {"messages": list(talk("And this?", "Nothing.").messages)},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSection.model_validate({"train": [{"path": str(tmp_path / "rows.jsonl")}], "eval_fraction": 0})
    for _ in range(2):  # read, and read from the cache
        sink = Recorder()
        prepare(data, "a tokenizer", chat(), 0, tmp_path / "cache", sink)
        said = [one.as_dict() for one in sink.of("notice") if one.as_dict()["topic"] == "special tokens"]
        assert sorted((one["count"], END in one["message"]) for one in said) == [(1, False), (2, True)]
