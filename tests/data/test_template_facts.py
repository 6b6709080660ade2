"""What is seen of a template: how turns end, and what a served prompt ends with."""

from __future__ import annotations

from functools import cache

import pytest

from qlora.data.template_facts import Ends, first_end, specials_in, split_end
from tests.data import shapes
from tests.data.shapes import SHAPES
from tests.data.toys import chat_of, chatml, family_chat

shape_chat = cache(shapes.shape_chat)  # each one starts a process that renders
ENDS = {
    "qwen35": Ends("<|im_end|>", "<|im_end|>"),
    "deepseek_v3": Ends("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "llama31": Ends("<|eot_id|>", "<|eom_id|>"),
    "gemma2": Ends("<end_of_turn>", "<end_of_turn>"),
    "gemma4": Ends("<turn|>", "<|tool_response>"),
    "mistral_v03": Ends("</s>", "</s>"),
    "command_r7b": Ends("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "glm4": Ends("<|user|>", "<|observation|>"),
    "gpt_oss": Ends("<|return|>", "<|call|>"),
}
LEADS = {
    "qwen35": "<think>\n",
    "qwen36": "<think>\n",
    "qwen35_small": "<think>\n\n</think>\n\n",
    "deepseek_r1": "<think>\n",
    "smollm3_no_think": "<think>\n\n</think>\n",
}


@pytest.mark.parametrize("name", ENDS)
def test_how_turns_end(name: str) -> None:
    assert shape_chat(name)._chat_template.ends == ENDS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_served_prompt_ends_with(name: str) -> None:
    facts = shape_chat(name)._chat_template.facts
    assert facts.lead == LEADS.get(name, "")
    assert facts.shuts_block() == ("</think>" in facts.lead)


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("{{ m.content }}<|im_end|><|endoftext|>\n", "<|im_end|>"),  # EOS, and another behind it
        ("{{ m.content }}<|endoftext|><|im_end|>\n", "<|im_end|>"),  # EOS ends the turn, what stands before is written
        ("{{ m.content }}\n<|im_end|>\n", "<|im_end|>"),
        ("{{ m.content }}{{ '<|im_end|>' if not loop.last }}", "<|im_end|>"),  # the last answer is left open
        ("{{ m.content }}{{ '<|im_start|>' if not loop.last }}", ""),  # what begins the next turn ends none
        ("{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}", "<|endoftext|>"),
    ],
)
def test_the_end_of_an_answer(body: str, end: str) -> None:
    assert chat_of(chatml(body))._chat_template.ends.answer == end


def test_the_turns_own_end_among_several() -> None:
    ends = ["<end>", "<eos>"]
    assert split_end("words<end>\n<eos>", ends) == ("words", "<end>")
    assert split_end("words<eos>", ends) == ("words", "<eos>")
    assert split_end("a<end>b\n<end>\n", ends) == ("a<end>b\n", "<end>")
    assert split_end("words \n", ends) == ("words", "")
    assert first_end("a<eos><end>", ends) == (1, 6)
    assert first_end("a<eos><end>", ends, 2) == (6, 11)
    assert first_end("a<eos>", ends, 0, 3) is None
    assert specials_in("a<eos><eos_2>", ["<eos>", "<eos_2>"]) == ["<eos>", "<eos_2>"]


@pytest.mark.parametrize("name", ["qwen35", "llama31", "gemma2", "mistral_v03", "command_r7b", "granite4", "gemma4"])
def test_most_templates_end_each_turn_by_itself_and_need_no_further_rendering(name: str) -> None:
    assert shape_chat(name)._chat_template.facts.first_end_is_the_end


def test_an_eos_after_the_whole_conversation_is_no_turns_end() -> None:
    chat = family_chat("phi3")
    assert chat._chat_template.facts.first_end_is_the_end
    assert chat._chat_template.ends == Ends("<|end|>", "<|end|>")
