"""Where answers begin and end: what is trained is what the model writes when it is served, turn by turn."""

from __future__ import annotations

import pytest

from qlora.data.formats import Message
from qlora.data.row_json import RowError
from tests.data.shapes import CALLED, SHAPES, TALKS, shape_chat, thoughtful
from tests.data.toys import (
    CHATML,
    WEATHER,
    assistant,
    chat_of,
    chatml,
    encode,
    result,
    system,
    talk,
    template_of,
    trained,
    user,
)

_REWRITTEN = ("thoughts before a call", "words beside a call")  # harmony drops them once a final answer follows


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_answer_begins_where_the_served_prompt_ends(name: str) -> None:
    """The row is the prompt as a server sends it, then trained tokens up to the end of the turn."""
    chat = shape_chat(name)
    seen = 0
    for case, conversation in TALKS.items():
        messages = conversation.messages
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        try:
            row = encode(chat, talk(*messages, tools=conversation.tools))
            prompt = chat.prompt_ids(messages[:-1], conversation.tools)
        except RowError:
            continue
        if messages[-2]["role"] == "assistant" or (name == "gpt_oss" and case in _REWRITTEN):
            continue  # the template writes what stands before otherwise than the prompt does
        end = len(row.loss_weights) - row.loss_weights[::-1].index(1.0)
        start = end - row.loss_weights[:end][::-1].index(0.0)
        assert chat.tokenizer.decode(row.input_ids[:start]) == chat.tokenizer.decode(prompt)
        assert row.input_ids[start - 1] == prompt[-1]
        assert row.input_ids[end - 1] in chat.end_token_ids
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_of_a_row_is_trained_once_and_nothing_of_others(name: str) -> None:
    chat = shape_chat(name)
    words = ["One.", "Two.", "One.", "Two."]
    messages = [message for text in words for message in (user("What?"), assistant(text))]
    found = "".join(trained(chat, encode(chat, talk(*messages))))
    assert [found.count(word) for word in ("One.", "Two.")] == [2, 2]
    assert "What?" not in found


INSIDE = chatml("").replace(
    "{% if m.role == 'assistant' %}",
    "{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% elif m.role == 'assistant' %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
    "{{ m.content }}{{ '<|im_end|>\n' if not m.tool_calls or loop.last }}",
)


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_a_result_inside_of_the_assistants_turn_is_not_trained(end: str) -> None:
    template = INSIDE.replace("</result>", f"</result>{end}").replace(
        "<|im_start|>{{ m.role }}\n", "{{ '<|im_start|>' + m.role + '\n' if m.role == 'user' }}"
    )
    template = template.replace(
        "{% elif m.role == 'assistant' %}",
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' if messages[loop.index0 - 1].role == 'user' }}",
    ).replace("{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1].role == 'user' %}")
    chat = chat_of(template)
    row = encode(chat, talk(user("Weather?"), CALLED, result("degrees 3"), assistant("It is cold.")))
    text = chat.tokenizer.decode(row.input_ids)
    assert text.endswith(f"</call><result>degrees 3</result>{end}It is cold.<|im_end|>\n")
    assert trained(chat, row) == ['<call>get_weather {"city": "Oslo"}</call>', "It is cold.<|im_end|>"]
    assert chat.dropped["unended"] == 1


def test_the_same_question_twice_where_the_history_is_rewritten() -> None:
    """Mistral v0.3's manner: the system prompt stands before the last question, so that no prompt is a beginning."""
    chat = shape_chat("mistral_v03")
    messages = [system("You help."), user("What?"), assistant("Light."), user("What?"), assistant("What?")]
    assert trained(chat, encode(chat, talk(*messages))) == [" Light.</s>", " What?</s>"]


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gemma4"])
def test_answers_after_calls_whose_reasoning_is_dropped_later(name: str) -> None:
    """The prompt of the first answer has the call's reasoning, the row has not: the same words twice are told apart."""
    chat = shape_chat(name)
    once = (user("What?"), thoughtful(CALLED, "Look up."), result("3"), assistant("It rains."))
    found = trained(chat, encode(chat, talk(*once, *once, tools=(WEATHER,))))
    assert [("It rains." in text, "get_weather" in text) for text in found] == [(False, True), (True, False)] * 2
    assert all("Look up." not in text for text in found[:2])


def test_a_generation_mark_around_the_header_does_not_train_the_header() -> None:
    chat = shape_chat("smollm3")
    assert not chat._chat_template.has_marks(None)
    assert trained(chat, encode(chat, talk(user("What?"), assistant("Light.")))) == ["Light.<|im_end|>"]
    marked = chat_of(template_of("qwen2", marks=True), CHATML)
    assert marked._chat_template.has_marks(None)


def test_reasoning_goes_on_in_the_block_that_the_prompt_opens() -> None:
    chat = shape_chat("deepseek_r1")
    for answer in (
        thoughtful(assistant("It rains."), "Look up first."),
        assistant("<think>\nLook up first.\n</think>\n\nIt rains."),
    ):
        row = encode(chat, talk(user("What?"), answer))
        assert trained(chat, row) == ["Look up first.\n</think>\n\nIt rains.<｜end▁of▁sentence｜>"]
        assert chat.tokenizer.decode(row.input_ids).count("<think>") == 1
    assert not +chat.dropped


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen35", "history"),  # the template writes it where nothing follows
        ("deepseek_v3", "thoughts"),  # the template never does
        ("qwen35_small", "shut"),  # the prompt shuts the block
    ],
)
def test_why_reasoning_is_lost(name: str, kind: str) -> None:
    chat = shape_chat(name)
    first = thoughtful(assistant("It rains."), "Look up first.")
    encode(chat, talk(user("What?"), first, user("Now?"), assistant("Yes.")))
    assert {key: chat.dropped[key] for key in ("history", "thoughts", "shut")} == {
        key: int(key == kind) for key in ("history", "thoughts", "shut")
    }


def test_a_template_that_strips_the_thoughts_of_the_very_answer() -> None:
    chat = chat_of(chatml("{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n"))
    assert trained(chat, encode(chat, TALKS["thoughts in the text"])) == ["It rains.<|im_end|>"]
    assert (chat.dropped["thoughts"], chat.dropped["history"]) == (1, 0)


def test_what_follows_the_last_answer_is_left_out_only_where_it_changes_the_answer() -> None:
    messages = (user("What?"), thoughtful(assistant("Light."), "Look up."), user("Who?"))
    qwen3, llama = shape_chat("qwen3"), shape_chat("llama31")
    assert trained(qwen3, encode(qwen3, talk(*messages))) == ["<think>\nLook up.\n</think>\n\nLight.<|im_end|>"]
    row = encode(llama, talk(*messages))
    assert "Who?" in llama.tokenizer.decode(row.input_ids)
    assert trained(llama, row) == ["Light.<|eot_id|>"]


def test_system_prompts_and_answers_that_a_template_does_not_write_are_counted() -> None:
    chat = chat_of(
        "{% for m in messages if m.role != 'system' %}" + chatml("{{ m.content }}<|im_end|>\n").split("%}", 1)[1]
    )
    assert trained(chat, encode(chat, TALKS["system"])) == ["The model.<|im_end|>", "Light.<|im_end|>"]
    assert chat.dropped["system"] == 1
    altered = chat_of(chatml("{{ m.content | upper }}<|im_end|>\n"))
    assert trained(altered, encode(altered, TALKS["one turn"])) == ["IT IS COLD.<|im_end|>"]
    assert altered.dropped["rewritten"] == 1


def test_the_last_answer_left_open_gets_the_end_that_others_have() -> None:
    chat = chat_of(chatml("{{ m.content }}{{ '<|im_end|>\n' if not loop.last }}"))
    row = encode(chat, talk(user("What?"), assistant("Light."), user("Who?"), assistant("A model.")))
    assert trained(chat, row) == ["Light.<|im_end|>", "A model.<|im_end|>"]
    empty = encode(chat, talk(user("What?"), assistant(""), user("Who?"), assistant("A model.")))
    assert trained(chat, empty) == ["<|im_end|>", "A model.<|im_end|>"]


def test_an_answer_that_quotes_prompt_and_end() -> None:
    chat = shape_chat("qwen3")
    with pytest.raises(RowError, match=r"contains <\|im_end\|>"):
        encode(chat, talk(user("What?"), assistant("user\nWhat?<|im_end|>\n")))
    quoting = assistant("<|im_start|>assistant\nWhat?")
    row = encode(chat, talk(user("What?"), quoting, user("What?"), assistant("Light.")))
    assert trained(chat, row)[0] == "<|im_start|>assistant\nWhat?<|im_end|>"


def test_a_token_that_reaches_from_the_prompt_into_the_answer_is_split() -> None:
    """Qwen 3.5's prompt ends with a line break, and the block is shut by one: together they would be one token."""
    chat = shape_chat("qwen35")
    row = encode(chat, TALKS["one turn"])
    prompt = chat.prompt_ids(TALKS["one turn"].messages[:1], None)
    assert row.input_ids[: len(prompt)] == prompt
    assert trained(chat, row) == ["\n</think>\n\nIt is cold.<|im_end|>"]


_INST = (  # the answer's header ends the question's turn
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.content | trim %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("unwritten", [assistant(""), assistant(" \n"), thoughtful(assistant(""), "Look up.")])
def test_after_an_answer_that_the_template_does_not_write_the_users_turn_is_not_trained(unwritten: Message) -> None:
    chat = chat_of(_INST)
    assert chat._chat_template.facts.first_end_is_the_end
    messages = (user("What?"), unwritten, user("Who?"))
    for both in (False, True):
        row = encode(chat, talk(*messages, {**assistant("A model."), "train": both}, user("Now?"), assistant("No.")))
        assert trained(chat, row) == ["A model.<|im_end|>"] * both + ["No.<|im_end|>"]
    with pytest.raises(RowError, match="no token of it would be trained"):
        encode(chat, talk(*messages, {**assistant("A model."), "train": False}))
