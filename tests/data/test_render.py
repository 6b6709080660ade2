"""The process that renders chat templates: replaced when it dies, and exact to the letter."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.render import Renderer, request_of
from qlora.data.row_json import RowError
from qlora.events import Recorder
from tests.data.toys import CASES, FAMILIES, family_tokenizer, template_of


def test_a_worker_that_dies_is_an_error_of_its_row_and_is_replaced() -> None:
    renderer = Renderer(["{{ messages[0].content }}"], {})
    request = request_of(0, {"messages": [{"role": "user", "content": "x"}]})
    assert renderer.render(request).text == "x"
    assert renderer._worker is not None
    renderer._worker._process.kill()
    with pytest.raises(RowError, match="it ended the process"):
        renderer.render(request)
    assert renderer.render(request).text == "x"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marks", [False, True], ids=["plain", "marks"])
def test_the_same_text_as_transformers_renders(family: str, marks: bool) -> None:
    """The process knows nothing of transformers; what it writes is the same, to the letter and the mark."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = family_tokenizer(family, marks)
    chat = ChatTokenizer(tokenizer, "assistant", Recorder())._chat_template
    for case in CASES:
        conversation = case.make()
        plain = [{k: v for k, v in message.items() if k != "train"} for message in conversation.messages]
        for prompt in (False, True):
            options: dict[str, Any] = {"date_string": "26 Jul 2024", **tokenizer.special_tokens_map}
            try:
                texts, spans = render_jinja_template(
                    conversations=[plain],
                    tools=list(conversation.tools) if conversation.tools else None,
                    chat_template=template_of(family, marks),
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **options,
                )
            except Exception as error:
                with pytest.raises(RowError, match="the chat template refuses"):
                    chat.render(conversation.messages, conversation.tools, prompt)
                assert str(error)
                continue
            assert chat.render(conversation.messages, conversation.tools, prompt) == texts[0]
            if marks and not prompt:
                assert chat.render_marked(conversation.messages, conversation.tools)[1] == [*map(tuple, spans[0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_asked_for_with_its_conversation_is_the_one_asked_for_alone(family: str) -> None:
    template = ChatTokenizer(family_tokenizer(family), "assistant", Recorder())._chat_template
    conversation = next(made for case in CASES if len((made := case.make()).messages) > 3)
    messages, tools = conversation.messages, conversation.tools
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole = template.request(messages, tools)
    ahead = [whole, *map(whole.prompt, numbers)]

    def text_of(request: Any) -> str:
        try:
            return template.rendered(request).text
        except RowError as error:
            return error.reason

    alone = [template.request(messages[:n], tools, add_generation_prompt=True) for n in numbers]
    expected = [text_of(request) for request in (template.request(messages, tools), *alone)]
    assert [text_of(request) for request in ahead] == expected  # each on its own
    template.render_ahead(ahead)
    assert [text_of(request) for request in ahead] == expected and len(set(expected)) > 1
