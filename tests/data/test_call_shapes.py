"""Templates that take a call, reasoning or content in one shape only, and what becomes of the others."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.call_shapes import CallShape, Reading, as_templates_read_it, thoughts_of, words_of
from qlora.data.chat import ChatTokenizer
from qlora.data.row_json import RowError
from tests.data.toys import WEATHER, assistant, call, chat_of, chatml, encode, result, talk, trained, user

CALL = call("get_weather", city="Oslo")
WORDS = {**CALL, "content": "I look."}
END = "<|im_end|>\n"
_LOOP = "{% for c in m.tool_calls or [] %}"


def calling(condition: str, written: str, otherwise: str = "{{ m.content }}") -> str:
    """A template that writes calls as `written` where `condition` holds."""
    calls = f"{_LOOP}{written}{{% endfor %}}"
    return chatml(f"{{% if {condition} %}}{calls}{{% else %}}{otherwise}{{% endif %}}{END}")


def first_trained(chat: ChatTokenizer, *messages: dict[str, Any]) -> str:
    return trained(chat, encode(chat, talk(user("Weather?"), *messages)))[0]


TEXT = "{{ c.function.name + ' ' + c.function.arguments }}"
OBJECT = "{{ c.function.name }} {{ c.function.arguments | tojson }}"
EXPECTED = 'get_weather {"city": "Oslo"}<|im_end|>'


@pytest.mark.parametrize(
    ("template", "shape"),
    [
        (calling("m.tool_calls", OBJECT), CallShape()),
        (calling("m.tool_calls", TEXT), CallShape(arguments="text")),
        (calling("m.content is none", OBJECT), CallShape(content="null")),
        (calling("m.content is none", TEXT), CallShape(content="null", arguments="text")),
        (calling("m.content is not defined", OBJECT), CallShape(content="absent")),
        (calling("m.tool_calls", "{{ c.name }} {{ c.arguments | tojson }}"), CallShape(wrapped=False)),
        # Python's spelling of an object is no JSON: the text is taken.
        (calling("m.tool_calls", "{{ c.function.name }} {{ c.function.arguments }}"), CallShape(arguments="text")),
        (
            calling("m.tool_calls", "{{ raise_exception('no ids') if c.id is defined }}" + OBJECT),
            CallShape(ids="none"),
        ),
    ],
)
def test_a_call_is_given_in_the_shape_that_the_template_writes(template: str, shape: CallShape) -> None:
    chat = chat_of(template)
    assert chat._chat_template.reading.shapes[False, False] == shape
    assert first_trained(chat, CALL) == EXPECTED
    assert first_trained(chat, assistant("It.")) == "It.<|im_end|>"


def test_ids_become_nine_letters_where_the_template_takes_no_others() -> None:
    """Mistral's: a call and its result have the same new id, and one of nine letters stays."""
    ids = "{{ raise_exception('nine letters') if c.id | length != 9 }}{{ c.id }} "
    template = calling("m.tool_calls", ids + OBJECT).replace(
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
        "{{ m.tool_call_id or '' }}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    )
    chat = chat_of(template)
    foreign = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": "call_0123456789"}]}
    answer = {**result("3"), "tool_call_id": "call_0123456789"}
    row = encode(chat, talk(user("Weather?"), foreign, answer, assistant("It.")))
    text = chat.tokenizer.decode(row.input_ids)
    assert "call_0123456789" not in text and text.count("id0000000") == 2
    assert first_trained(chat, CALL) == "call00000 " + EXPECTED


def test_no_shape_is_written() -> None:
    with pytest.raises(RowError, match="does not write tool calls"):
        first_trained(chat_of(chatml("{{ m.content }}" + END)), CALL)


def test_a_template_that_refuses_every_shape_says_so_itself() -> None:
    template = chatml("{{ raise_exception('no calls here') if m.tool_calls }}{{ m.content }}" + END)
    with pytest.raises(RowError, match="no calls here"):
        first_trained(chat_of(template), CALL)


def test_calls_that_are_written_only_where_tools_are_given() -> None:
    chat = chat_of(calling("tools and m.tool_calls", OBJECT))
    row = encode(chat, talk(user("Weather?"), CALL, tools=(WEATHER,)))
    assert trained(chat, row) == [EXPECTED]


@pytest.mark.parametrize(
    ("template", "written", "dropped"),
    [
        (calling("m.tool_calls", OBJECT), EXPECTED, 1),  # only the call
        (calling("m.content is none", TEXT), EXPECTED, 1),  # DeepSeek R1's: the call only where there are no words
        (calling("m.tool_calls", "{{ m.content }} " + OBJECT), "I look. " + EXPECTED, 0),
    ],
)
def test_words_beside_a_call_are_kept_or_counted(template: str, written: str, dropped: int) -> None:
    chat = chat_of(template)
    assert first_trained(chat, WORDS) == written
    assert chat.dropped["words"] == dropped


def test_thoughts_or_words_where_a_template_refuses_both() -> None:
    """gpt-oss's: beside a call either may stand. The thoughts are kept, the words counted."""
    both = "{{ raise_exception('not both') if m.content and m.thinking }}{{ m.content }}{{ m.thinking or '' }} "
    chat = chat_of(calling("m.tool_calls", both + OBJECT))
    assert first_trained(chat, {**WORDS, "reasoning_content": "Look up."}) == "Look up. " + EXPECTED
    assert chat.dropped == {"words": 1} | {key: 0 for key in chat.dropped if key != "words"}


@pytest.mark.parametrize("thoughts", [{"reasoning_content": "Look."}, {}])
def test_reasoning_is_put_where_the_template_reads_it(thoughts: dict[str, str]) -> None:
    given = assistant("It." if thoughts else "<think>\nLook.\n</think>\n\nIt.", **thoughts)
    keyed = chat_of(chatml("<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{{ m.content }}" + END))
    assert first_trained(keyed, given) == "<think>\nLook.\n</think>\n\nIt.<|im_end|>"
    inline = chat_of(chatml("{{ m.content }}" + END + "{# <think> #}"))
    assert first_trained(inline, given) == "<think>\nLook.\n</think>\n\nIt.<|im_end|>"
    assert inline.dropped["inlined"] == bool(thoughts)


def test_reasoning_is_not_put_into_the_text_of_a_model_that_does_not_think() -> None:
    chat = chat_of(chatml("{{ m.content }}" + END))
    assert first_trained(chat, assistant("It.", reasoning_content="Look.")) == "It.<|im_end|>"
    assert chat.dropped["thoughts"] == 1


def test_content_as_parts_where_a_template_takes_no_text() -> None:
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    template = chatml("{{ m.content }}" + END).replace("{{ m.content }}", parts)
    chat = chat_of(template)
    row = encode(chat, talk(user("What?"), assistant("It.")))
    assert chat.tokenizer.decode(row.input_ids).startswith("<|im_start|>user\nWhat?<|im_end|>")
    assert trained(chat, row) == ["It.<|im_end|>"]


def test_messages_are_not_changed_where_nothing_asks_for_it() -> None:
    messages = [user("a"), {**WORDS, "train": False}, result("3"), assistant("b", reasoning_content="c")]
    read = as_templates_read_it(messages, Reading())
    assert read[:3] == [user("a"), WORDS, result("3")]
    assert read[3] == {**assistant("b"), "thinking": "c", "reasoning_content": "c"}


def test_thoughts_and_words_of_an_answer() -> None:
    inside = assistant("<think>\nLook.\n</think>\n\nIt.")
    assert (thoughts_of(inside), words_of(inside)) == ("Look.", "It.")
    keyed = assistant("It.", reasoning_content="Look.")
    assert (thoughts_of(keyed), words_of(keyed)) == ("Look.", "It.")
    assert (thoughts_of(assistant("a </think> b")), words_of(assistant("a </think> b"))) == ("", "a </think> b")
