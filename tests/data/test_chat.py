"""Tokens and masks beyond the golden files: odd templates, BOS, borders, and what is refused."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.data.chat import ChatTokenizer
from qlora.data.formats import Conversation
from qlora.data.row_json import RowError
from qlora.errors import TokenizerError
from qlora.events import Recorder
from tests.data.toys import (
    CASES,
    FAMILIES,
    WEATHER,
    assistant,
    call,
    chat_of,
    chatml,
    encode,
    family_chat,
    family_tokenizer,
    notices,
    result,
    system,
    talk,
    template_of,
    trained,
    user,
)


@cache
def shared_chat(family: str) -> ChatTokenizer:
    """For many examples in a row: each new one starts a process that renders."""
    return family_chat(family)


# --- what is trained ----------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Co", "Cn"), exclude_characters="<|[]"), min_size=1)
answers = words.map(str.strip).filter(bool)


@settings(deadline=None, max_examples=40)
@given(questions=st.lists(answers, min_size=3, max_size=3), replies=st.lists(answers, min_size=3, max_size=3))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_text_is_every_answer_with_its_end_and_nothing_else(
    family: str, questions: list[str], replies: list[str]
) -> None:
    chat = shared_chat(family)
    messages = [m for pair in zip(map(user, questions), map(assistant, replies), strict=True) for m in pair]
    end = chat.tokenizer.convert_ids_to_tokens(chat.end_token_ids[0])
    expected = [reply + end for reply in replies]
    if family == "qwen3":
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    if family == "mistral":
        expected = [" " + text for text in expected]
    found = trained(chat, encode(chat, talk(*messages)))
    assert [unicodedata.normalize("NFC", text) for text in found] == [
        unicodedata.normalize("NFC", text) for text in expected
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_continues_the_prompt_that_is_served(family: str) -> None:
    chat = family_chat(family)
    for case in CASES:
        conversation = case.make()
        try:
            row = encode(chat, conversation)
        except RowError:
            continue
        prompt = chat.prompt_ids(conversation.messages[:-1], conversation.tools)
        if case.name != "system":  # its last answer begins with a line break, which joins that of the header
            assert row.input_ids[: len(prompt)] == prompt
            assert not row.loss_weights[len(prompt) - 1] and row.loss_weights[len(prompt)]


def test_a_line_break_joined_across_the_border_is_the_prompts() -> None:
    chat = family_chat("qwen2")
    row = encode(chat, talk(user("a"), assistant("\nb")))
    assert chat.tokenizer.decode(row.input_ids).count("assistant\n\nb") == 1
    assert trained(chat, row) == ["b<|im_end|>"]


def test_a_word_joined_with_the_prompts_space_is_trained() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = chat_of(template)
    assert trained(chat, encode(chat, talk(user("What"), assistant("Yes")))) == [" Yes<|im_end|>"]


def test_sentencepiece_style_offsets() -> None:
    vocab = {char: number for number, char in enumerate(["<s>", "</s>", "[INST]", "[/INST]", "▁", *"HiYes"])}
    for piece in ("▁H", "▁Hi", "▁Y", "▁Ye", "▁Yes"):
        vocab[piece] = len(vocab)
    merges = [("▁", "H"), ("▁H", "i"), ("▁", "Y"), ("▁Y", "e"), ("▁Ye", "s")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=template_of("mistral", marks=False),
    )
    chat = ChatTokenizer(tokenizer, "assistant", Recorder())
    row = encode(chat, talk(user("Hi"), assistant("Yes")))
    pieces = chat.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert pieces == ["<s>", "[INST]", "▁Hi", "[/INST]", "▁Yes", "</s>"]
    assert row.loss_weights == [0, 0, 0, 0, 1, 1]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    tokenizer = family_tokenizer("qwen2")
    slow = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})
    tokenizer.__class__ = slow
    with pytest.raises(TokenizerError, match="no fast tokenizer"):
        ChatTokenizer(tokenizer, "assistant", Recorder())


def test_context_only_turns_are_not_trained() -> None:
    chat = family_chat("llama3")
    row = encode(chat, talk(user("a"), assistant("b", train=False), user("c"), assistant("d")))
    assert trained(chat, row) == ["d<|eot_id|>"]


def test_loss_on_all_trains_every_token_but_the_first() -> None:
    for family in FAMILIES:
        chat = family_chat(family, loss_on="all")
        row = encode(chat, talk(user("a"), assistant("b")))
        assert row.loss_weights == [0.0] + [1.0] * (len(row.input_ids) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_is_trained_whole_with_eos(family: str) -> None:
    chat = family_chat(family)
    row = encode(chat, Conversation(text="It is cold. "))
    bos = [chat.tokenizer.bos_token_id] if chat.tokenizer.bos_token_id is not None else []
    body = chat.tokenizer("It is cold. ", add_special_tokens=False)["input_ids"]
    assert row.input_ids == [*bos, *body, chat.tokenizer.eos_token_id]
    assert row.loss_weights == [0.0] + [1.0] * (len(row.input_ids) - 1)


def test_many_at_once_are_as_one_by_one() -> None:
    chat = family_chat("llama3")
    conversations = [case.make() for case in CASES] + [talk(user("a")), Conversation(text="b")]
    together = chat.encode_many(conversations)
    for conversation, row in zip(conversations, together, strict=True):
        if isinstance(row, RowError):
            with pytest.raises(RowError, match=re.escape(row.reason)):
                encode(chat, conversation)
        else:
            assert encode(chat, conversation) == row
    assert isinstance(together[-2], RowError)


# --- BOS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma"])
def test_there_is_one_bos(family: str) -> None:
    for template in (template_of(family, marks=False), template_of("qwen2", marks=False)):
        chat = chat_of(template, FAMILIES[family])
        bos, bos_text = chat.tokenizer.bos_token_id, chat.tokenizer.bos_token
        row = encode(chat, talk(user("a"), assistant("b")))
        texts = [encode(chat, Conversation(text=text)) for text in ("x", f"{bos_text}x", f"{bos_text}{bos_text}x")]
        prompt = chat.prompt_ids([user("a")], None)
        for ids in (row.input_ids, prompt, *(text.input_ids for text in texts)):
            assert ids[0] == bos and ids.count(bos) == 1


def test_no_bos_where_neither_template_nor_tokenizer_has_one() -> None:
    chat = family_chat("qwen2")
    assert chat.tokenizer.bos_token_id is None
    assert chat.tokenizer.decode(chat.prompt_ids([user("a")], None)[:1]) == "<|im_start|>"


# --- templates that do odd things ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",  # marks without the end token
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}",  # marks with the line break after it
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}<|im_end|>"
        "{% endgeneration %}{{ '\n' }}",  # marks around parts of an answer
        "{{ m.content }}<|im_end|>\n",
        "{{ m.content | trim }}\n<|im_end|>\n",
    ],
)
def test_the_end_token_is_trained_and_the_line_break_after_it_is_not(body: str) -> None:
    chat = chat_of(chatml(body))
    row = encode(chat, talk(user("a"), assistant("bcd"), user("e"), assistant("fgh")))
    assert [text.replace("\n", "") for text in trained(chat, row)] == ["bcd<|im_end|>", "fgh<|im_end|>"]
    assert not row.loss_weights[-1]


def test_an_end_token_in_a_question_does_not_end_an_answer() -> None:
    for body in ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", "{{ m.content }}<|im_end|>\n"):
        chat = chat_of(chatml(body))
        row = encode(chat, talk(user("a <|im_end|> b"), assistant("c"), user("<|im_end|>"), assistant("d")))
        assert trained(chat, row) == ["c<|im_end|>", "d<|im_end|>"]


def test_an_end_token_in_a_question_does_not_end_a_marked_answer_that_has_none() -> None:
    answer = "{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}"
    question = "{{ m.content }}{{ '\n' }}"
    chat = chat_of(
        "{% for m in messages %}{% if m.role == 'user' %}"
        + question
        + "{% else %}"
        + answer
        + "{% endif %}{% endfor %}"
    )
    row = encode(chat, talk(user("a"), assistant("b"), user("c <|im_end|>"), assistant("d")))
    assert trained(chat, row) == ["b", "d<|im_end|>"]


def test_a_template_without_end_tokens_gets_one_at_the_end_of_the_row() -> None:
    template = "{% for m in messages %}\n### {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}\n### assistant\n{% endif %}"
    chat = chat_of(template)
    row = encode(chat, talk(user("a"), assistant("b c"), user("d"), assistant("e")))
    assert trained(chat, row) == ["b c", "e<|im_end|>"]
    assert row.input_ids[-1] == chat.tokenizer.eos_token_id
    assert "<|im_end|> is added" in notices(chat, "template")[0].message
    assert encode(chat_of(template, loss_on="all"), talk(user("a"), assistant("b"))).input_ids[-1] == row.input_ids[-1]


@pytest.mark.parametrize("inside", [True, False])
def test_reasoning_lost_from_history_is_counted(inside: bool) -> None:
    def thoughtful(thought: str, answer: str) -> dict[str, Any]:
        text = f"<think>\n{thought}\n</think>\n\n{answer}"
        return assistant(text) if inside else assistant(answer, reasoning_content=thought)

    chat = family_chat("qwen3")
    row = encode(chat, talk(user("a"), thoughtful("why b", "b"), user("c"), thoughtful("why d", "d")))
    assert chat.dropped["history"] == 1
    assert trained(chat, row) == ["b<|im_end|>", "<think>\nwhy d\n</think>\n\nd<|im_end|>"]


@pytest.mark.parametrize("thought", [{"reasoning_content": "Look."}, {}])
def test_answers_are_found_where_the_history_is_rewritten(thought: dict[str, str]) -> None:
    """Qwen 3's manner: a call's reasoning stands only until the next question, so prompts are no prefix of the row."""
    chat = family_chat("qwen3")
    conversation = talk(
        user("a"),
        {**call("get_weather", city="Oslo"), **thought},
        result("1"),
        {**call("get_weather", 1, city="Paris"), **thought},
        result("1", 1),
        assistant("b"),
        user("a"),
        assistant("c"),
        tools=(WEATHER,),
    )
    found = trained(chat, encode(chat, conversation))
    assert [text[-len("</tool_call><|im_end|>") :] for text in found[:2]] == ["</tool_call><|im_end|>"] * 2
    assert ["Oslo" in found[0], "Paris" in found[1]] == [True, True]
    assert found[2:] == ["b<|im_end|>", "<think>\n\n</think>\n\nc<|im_end|>"]


def test_an_answer_that_cannot_be_found_is_refused() -> None:
    body = "{{ m.content if loop.last else m.content | length }}<|im_end|>\n"
    template = chatml(body).replace("{{ m.content }}<|im_end|>", "{{ messages | length }}<|im_end|>")
    chat = chat_of(template)
    assert trained(chat, encode(chat, talk(user("a"), assistant("b")))) == ["b<|im_end|>"]
    with pytest.raises(RowError, match="answer 1 is not found"):
        encode(chat, talk(user("a"), assistant("b"), user("c"), assistant("d")))


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("gemma", [system("a"), user("b"), assistant("c")], "System role not supported"),
        ("gemma", [user("a"), user("b"), assistant("c")], "Roles must alternate"),
        ("gemma", [user("a"), call("f"), result("1"), assistant("c")], "does not write tool calls"),
        ("phi3", [user("a"), call("f"), result("1"), assistant("c")], "does not write tool calls"),
        ("mistral", [user("a"), assistant("b"), assistant("c")], "must take turns"),
        ("llama3", [user("a"), {**call("f"), "tool_calls": [*call("f")["tool_calls"] * 2]}], "one call at a time"),
    ],
)
def test_a_templates_own_words_reach_the_user(family: str, messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        encode(family_chat(family), talk(*messages))


def test_tools_that_the_template_does_not_show_are_told_of_once() -> None:
    chat = family_chat("gemma")
    for _ in range(3):
        encode(chat, talk(user("a"), assistant("b"), tools=(WEATHER,)))
    assert len(notices(chat, "tools")) == 1
