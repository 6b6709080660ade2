"""Bases that think: their templates' switch, what they write before an answer, and thoughts that come all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora.data.chat import TokenRow
from qlora.data.formats import Conversation
from qlora.events import Recorder
from qlora.recipe.reading import Recipe
from qlora.study import generation, thinking
from qlora.study.generation import Manner, write
from qlora.study.labels import labels_of
from qlora.study.prompts import lead_ids, prompt_ids, served_ids
from qlora.study.teacher import Teacher
from qlora.study.thinking import Thoughts, lead, may_think, settled, without
from tests.data.shapes import shape_chat
from tests.data.toys import template_of
from tests.families import make_config, make_model
from tests.study.cases import chat, tiny_teacher

EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        ("qwen3", EMPTY),
        ("qwen35_small", ""),  # told so by its switch: its prompt has the block
        ("deepseek_r1", "\n</think>\n\n"),  # its prompt opens one
        ("gpt_oss", "<|channel|>final<|message|>"),
        ("gemma3", ""),
        ("llama31", ""),
        ("mistral_v01", ""),
    ],
)
def test_what_a_template_writes_before_an_answer(shape: str, written: str) -> None:
    of = shape_chat(shape)
    assert of.tokenizer.decode(lead_ids(of, "chat")) == written and lead_ids(of, "chat") == lead(of)
    # The teacher's prompt is the beginning of what an ordinary row trains, and a server's prompt the beginning of that.
    said = {"role": "assistant", "content": "It rains."}
    (row,) = of.encode_many([Conversation(({"role": "user", "content": "How is it?"}, said))])
    asked = prompt_ids(of, "chat", "How is it?")
    assert isinstance(row, TokenRow) and row.input_ids[: len(asked)] == asked
    served = served_ids(of, "chat", "How is it?")
    assert asked == [*served, *lead_ids(of, "chat")] and not any(row.loss_weights[: len(served)])
    assert all(row.loss_weights[len(served) : len(asked)]) and lead_ids(of, "lines") == ()
    assert not of.dropped["no block"] and Thoughts.of(of).opened == ""


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("smollm3", True), ("smollm3_no_think", False), ("qwen3", False),  # in whose rows stands an empty block
        ("qwen35_small", False), ("deepseek_r1", False), ("gpt_oss", False), ("gemma3", False), ("mistral_v01", False),
    ],
)  # fmt: skip
def test_who_says_before_an_answer_that_there_are_no_thoughts_has_none(shape: str, said: bool) -> None:
    assert may_think(shape_chat(shape)) is said


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    """A base whose template is another's."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def recipe_of(base: Path, **tables: Any) -> Recipe:
    tables = {"model": {"base": str(base)}, "data": {"documents": [{"path": "m"}]}, **tables}
    return Recipe.model_validate(tables)


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        ("qwen35", {"enable_thinking": False}),
        ("smollm3", {"enable_thinking": False}),
        ("gemma3", {}),
        ("deepseek_r1", {}),
    ],
)
def test_a_switch_of_the_template_is_off(base: Path, template: str, kwargs: dict[str, bool]) -> None:
    (base / "chat_template.jinja").write_text(template_of(template, False))
    sink = Recorder()
    assert settled(recipe_of(base), base, sink).model.template_kwargs == kwargs
    assert len(sink.of("notice")) == len(kwargs)


def test_what_somebody_set_stays(base: Path) -> None:
    (base / "chat_template.jinja").write_text(template_of("qwen35", False))
    with_rows = {"documents": [{"path": "m"}], "train": [{"path": "rows.jsonl"}]}
    for tables in (
        {"model": {"base": str(base), "template_kwargs": {"enable_thinking": True}}},
        {"model": {"base": str(base), "template_kwargs": {}}},  # as a run recorded it that began without
        {"model": {"base": str(base), "chat_template": "chatml"}},
        {"data": with_rows},
        {"data": {"train": [{"path": "rows.jsonl"}]}},
    ):
        recipe, sink = recipe_of(base, **tables), Recorder()
        assert settled(recipe, base, sink) is recipe and not sink.events


# --- thoughts that come all the same ----------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(chat().tokenizer.encode(text, add_special_tokens=False))


def saying(texts: dict[int, str]) -> Any:
    """A model that writes a text after a prompt that ends with a token, and then the end of the turn."""
    end = chat().end_token_ids[0]
    said = {token: [*ids(text), end] for token, text in texts.items()}
    model = make_model(make_config("llama", overrides={"use_cache": False}))

    def forward(input_ids: Any, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 384)
        for row, tokens in enumerate(input_ids.tolist()):
            start = next(at for at, token in enumerate(tokens) if token in said)
            written = said[tokens[start]]
            logits[row, -1, written[min(len(tokens) - start - 1, len(written) - 1)]] = 20.0
        return CausalLMOutputWithPast(logits=logits)

    model.forward = forward
    return model


def manner(limit: int) -> Manner:
    return Manner(
        limit, frozenset(chat().end_token_ids), chat().pad_id, spoken_from=Thoughts(chat().tokenizer).spoken_from
    )


THOUGHT = "<think>\nThe passage says that it is seven years, so that is what I say.\n</think>\n\nSeven years."


def test_thoughts_are_cut_and_cost_the_answer_nothing() -> None:
    answers = {5: THOUGHT, 6: "Seven years.", 7: "<thin ice>"}
    found = write(saying(answers), [[5], [6], [7]], manner(24))
    thought, plain, other = found
    assert chat().tokenizer.decode(thought.token_ids) == "Seven years." and thought.ended
    assert thought.token_ids == plain.token_ids and plain.thoughts == 0 < thought.thoughts
    assert chat().tokenizer.decode(other.token_ids) == "<thin ice>" and other.ended
    # Labels are of the answer alone: a place a token, and the end.
    labels = labels_of(thought, chat().end_token_ids[0])
    assert labels.ids[:, 0].tolist() == [*thought.token_ids, chat().end_token_ids[0]]
    assert len(thought.logprobs) == len(thought.token_ids) == len(thought.top_ids) - 1


def test_thoughts_without_an_end_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_THOUGHTS", 40)
    found = write(saying({5: "<think>" + "and so on " * 40, 6: "Yes."}), [[5], [6]], manner(8))
    assert found[0].token_ids == () and not found[0].ended and found[0].thoughts
    assert len(found[0].top_ids) == 0 and chat().tokenizer.decode(found[1].token_ids) == "Yes."
    # Whoever thinks to its own end, and says nothing, has ended.
    (silent,) = write(saying({5: "<think>a</think>"}), [[5]], manner(8))
    assert silent.token_ids == () and silent.ended and len(silent.top_ids) == 1


def test_an_empty_answer_and_an_answer_of_the_whole_length_are_as_they_were() -> None:
    empty, whole = write(saying({5: "", 6: "Seven years and a day."}), [[5], [6]], manner(4))
    assert empty.ended and empty.token_ids == () and len(empty.top_ids) == 1
    assert len(whole.token_ids) == 4 and not whole.ended and len(whole.top_ids) == 4


def test_a_block_that_the_prompt_opens_is_cut_where_it_ends() -> None:
    heard = Thoughts(chat().tokenizer, "</think>")
    said = ids("I think</think>\n\nYes.")
    assert heard.spoken_from(said[:3], False) is None
    assert chat().tokenizer.decode(said[heard.spoken_from(said, False) :]) == "Yes."


def test_the_teacher_counts_what_it_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Recorder()
    teacher = tiny_teacher(saying({5: THOUGHT}), sink)
    monkeypatch.setattr(Teacher, "ids", lambda *_: [5])
    texts = teacher.sample("chat", ["How long?", "Why?"], [1, 2], 24, 0.1)
    assert texts == ["Seven years."] * 2
    teacher.tell_thoughts()
    teacher.tell_thoughts()
    (said,) = sink.of("notice")
    assert said.as_dict()["count"] == 2 and "thoughts" in said.as_dict()["message"]


def test_thoughts_in_a_text_are_cut_too() -> None:
    assert without(THOUGHT) == "Seven years." and without("Yes, <think> is a word.") == "Yes, <think> is a word."
    assert without("[THINK]never ending") == ""


def test_records_of_a_base_that_thinks_are_its_own() -> None:
    plain = recipe_of(Path("b"))
    told = recipe_of(Path("b"), model={"base": "b", "template_kwargs": {"enable_thinking": False}})
    assert thinking.identity(chat(), plain) == ()
    assert len({thinking.identity(chat(), told), thinking.identity(shape_chat("qwen3"), plain), ()}) == 3
