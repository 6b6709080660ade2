"""The base's template: what is seen in it, what stands in for one that is missing, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora.chatml import template as chatml_ending
from qlora.data.chat import ChatFormat, ChatTokenizer
from qlora.data.formats import Conversation
from qlora.errors import TokenizerError
from qlora.events import Recorder
from tests.data.toys import (
    CASES,
    CHATML,
    FAMILIES,
    WEATHER,
    assistant,
    chat_of,
    chatml,
    encode,
    family_chat,
    talk,
    template_of,
    toy_tokenizer,
    trained,
    user,
)


def test_calls_that_end_otherwise_than_answers() -> None:
    chat = family_chat("llama3")
    assert [chat.tokenizer.decode([token]) for token in chat.end_token_ids] == ["<|eot_id|>", "<|eom_id|>"]


def test_a_turns_end_comes_before_eos() -> None:
    chat = family_chat("phi3")
    assert [chat.tokenizer.decode([token]) for token in chat.end_token_ids] == ["<|end|>", "<|endoftext|>"]


def test_a_named_template_for_tools_is_used_with_tools() -> None:
    tokenizer = toy_tokenizer(CHATML)
    plain, with_tools = chatml("{{ m.content }}<|im_end|>\n"), template_of("qwen2", marks=False)
    tokenizer.chat_template = {"default": plain, "tool_use": with_tools}
    chat = ChatTokenizer(tokenizer, "assistant", Recorder())
    assert chat.template == plain
    assert "get_weather" in tokenizer.decode(chat.prompt_ids([user("a")], [WEATHER]))


def test_chatml_writes_calls_results_and_tools() -> None:
    chat = chat_of(chatml_ending("<|im_end|>"))
    conversation = CASES[3].make()
    row = encode(chat, conversation)
    found = trained(chat, row)
    assert found[1] == "It is cold.<|im_end|>"
    assert found[0] == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert '"description": "the weather now"' in chat.tokenizer.decode(row.input_ids)
    assert chat.template and "im_start" in chat.template


def test_without_a_template_text_can_be_trained_and_conversations_are_refused() -> None:
    chat = chat_of(None)
    assert chat.template is None
    assert trained(chat, encode(chat, Conversation(text="It is cold.")))
    with pytest.raises(TokenizerError, match="the base has no chat template, and the rows are conversations") as caught:
        encode(chat, CASES[3].make())
    assert caught.value.hint.startswith('add chat_template = "chatml" under [model]')
    assert ChatFormat.of(chat.tokenizer).template is None
    assert ChatFormat.of(chat.tokenizer).end_ids == (chat.tokenizer.eos_token_id,)


def test_chatml_ends_turns_with_eos_where_the_vocabulary_has_no_end_of_its_own() -> None:
    chat = chat_of(chatml_ending("</s>"), FAMILIES["mistral"])
    assert trained(chat, encode(chat, talk(user("a"), assistant("b"))))[0] == "b</s>"
    assert chat.end_token_ids == (chat.tokenizer.eos_token_id,)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = toy_tokenizer(replace(CHATML, special=(), eos=None))
    with pytest.raises(TokenizerError, match="no token that ends an answer") as caught:
        ChatTokenizer(tokenizer, "assistant", Recorder())
    assert "eos_token" in caught.value.hint


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages.nothing.at_all }}", "{{ 1 / 0 }}"])
def test_a_template_that_cannot_be_rendered_is_refused(template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template fails"):
        chat_of(template)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(TokenizerError, match="fails"):
        chat_of("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_the_day_of_tokenizing_does_not_matter() -> None:
    chat = family_chat("llama3")
    assert "26 Jul 2024" in chat.tokenizer.decode(chat.prompt_ids([user("a")], None))
