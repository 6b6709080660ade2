"""ChatML with any end token, rendered as transformers does."""

from __future__ import annotations

import pytest

from qlora import chatml
from qlora.data.render import Renderer, request_of

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "R"},
    {"role": "assistant", "content": "A"},
]


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<'\\end>", "<\\n>"])
def test_turns_end_with_the_token(end: str) -> None:
    renderer = Renderer([chatml.template(end)], {})
    text = renderer.render(request_of(0, {"messages": MESSAGES, "add_generation_prompt": True})).text
    assert text == (
        f"<|im_start|>system\nS{end}\n<|im_start|>user\nQ{end}\n<|im_start|>assistant\n"
        f'<tool_call>\n{{"name": "f", "arguments": {{"x": 1}}}}\n</tool_call>{end}\n'
        f"<|im_start|>user\n<tool_response>\nR\n</tool_response>{end}\n<|im_start|>assistant\nA{end}\n"
        "<|im_start|>assistant\n"
    )
