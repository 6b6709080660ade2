"""The shapes of this year's chat templates: their special tokens, and conversations that are awkward for some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora.data.chat import ChatTokenizer
from qlora.data.formats import Conversation
from qlora.events import Recorder
from tests.data.toys import (
    FAMILIES,
    LLAMA3_SPLIT,
    TEMPLATES,
    WEATHER,
    Family,
    assistant,
    call,
    result,
    system,
    talk,
    template_of,
    toy_tokenizer,
    user,
)

_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_CHATML = Family(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", plain=_THINK, split=LLAMA3_SPLIT)
_DEEPSEEK = Family(
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
     "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>",
     "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
    "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>", adds_bos=True, split=LLAMA3_SPLIT,
)  # fmt: skip
# A template's file, what is set at its head, and the tokenizer's special tokens.
SHAPES: dict[str, tuple[str, str, Family]] = {
    "qwen3": ("qwen3", "", FAMILIES["qwen3"]),
    "qwen35": ("qwen35", "", _CHATML),
    "qwen35_small": ("qwen35", "{%- set enable_thinking = false %}", _CHATML),
    "qwen36": ("qwen35", "{%- set preserve_thinking = true %}", _CHATML),
    "deepseek_r1": ("deepseek_r1", "", replace(_DEEPSEEK, plain=_THINK)),
    "deepseek_v3": ("deepseek_v3", "", _DEEPSEEK),
    "llama31": ("llama3", "", FAMILIES["llama3"]),
    "gemma2": ("gemma", "", FAMILIES["gemma"]),
    "gemma3": ("gemma3", "", FAMILIES["gemma"]),
    "gemma4": ("gemma4", "", Family(
        ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
         "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", '<|"|>'),
        "<turn|>", "<pad>", "<bos>", adds_bos=True,
    )),
    "mistral_v01": ("mistral_v1", "", FAMILIES["mistral"]),
    "mistral_v03": ("mistral", "", FAMILIES["mistral"]),
    "mistral_small3": ("mistral_small3", "", Family(
        (*FAMILIES["mistral"].special, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[CALL_ID]", "[ARGS]", "[TOOL_CONTENT]"),
        "</s>", bos="<s>", adds_bos=True,
    )),
    "command_r7b": ("command_r7b", "", Family(
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>",
         "<|START_THINKING|>", "<|END_THINKING|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
        "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", adds_bos=True,
    )),
    "phi4": ("phi4", "", Family(("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>")),
    "smollm3": ("smollm3", "", _CHATML),
    "smollm3_no_think": ("smollm3", "{%- set enable_thinking = false %}", _CHATML),
    "glm4": ("glm4", "", Family(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|endoftext|>", split=LLAMA3_SPLIT,
    )),
    "gpt_oss": ("gpt_oss", "", Family(
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|endoftext|>"), "<|return|>",
        split=LLAMA3_SPLIT,
    )),
    "granite4": ("granite4", "", Family(
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>", plain=_THINK[2:],
    )),
    "lfm2": ("lfm2", "", Family(
        ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
         "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
        "<|im_end|>", bos="<|startoftext|>", adds_bos=True, plain=_THINK, split=LLAMA3_SPLIT,
    )),
}  # fmt: skip


def shape_chat(name: str, loss_on: str = "assistant") -> ChatTokenizer:
    """A tokenizer with the template of that shape."""
    file, head, family = SHAPES[name]
    marks = "{%- generation %}" in (TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8") and name.startswith("smol")
    return ChatTokenizer(toy_tokenizer(family, head + template_of(file, marks)), loss_on, Recorder())


def thoughtful(message: dict[str, Any], thoughts: str) -> dict[str, Any]:
    return {**message, "reasoning_content": thoughts}


CALLED = call("get_weather", city="Oslo")
TALKS: dict[str, Conversation] = {
    "one turn": talk(user("What is it?"), assistant("It is cold.")),
    "the same question twice": talk(user("What?"), assistant("Light."), user("What?"), assistant("Wind.")),
    "the same answer twice": talk(user("What?"), assistant("Light."), user("Where?"), assistant("Light.")),
    "system": talk(system("You help."), user("Who?"), assistant("The model."), user("What?"), assistant("Light.")),
    "thoughts": talk(user("What is it?"), thoughtful(assistant("It rains."), "Look up first.")),
    "thoughts in the text": talk(user("What?"), assistant("<think>\nLook up first.\n</think>\n\nIt rains.")),
    "thoughts in history": talk(
        *(user("What is it?"), thoughtful(assistant("It rains."), "Look up first.")),
        *(user("Now?"), thoughtful(assistant("Yes."), "It rains now.")),
    ),
    "a call": talk(user("Weather?"), CALLED, result('{"degrees": 3}'), assistant("It is cold."), tools=(WEATHER,)),
    "words beside a call": talk(
        user("Weather?"), {**CALLED, "content": "I look."}, result("3"), assistant("It is cold."), tools=(WEATHER,)
    ),
    "thoughts before a call": talk(
        user("Weather?"), thoughtful(CALLED, "Look up."), result("3"), assistant("It is cold."), tools=(WEATHER,)
    ),
    "ends with a call": talk(user("Weather?"), CALLED, tools=(WEATHER,)),
    "ends with a question": talk(user("What?"), thoughtful(assistant("Light."), "Look up."), user("Who?")),
    "ends with a result": talk(user("Weather?"), CALLED, result("3"), tools=(WEATHER,)),
    "two answers in a row": talk(user("What?"), assistant("Light."), assistant("And wind.")),
    "the prompt in an answer": talk(user("What?"), assistant("assistant\nWhat?"), user("What?"), assistant("user")),
}
