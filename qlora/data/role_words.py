"""Who speaks in a turn, in the words of every export: ShareGPT, OpenAI, Gemini, Cohere, OASST, LangChain, ms-swift.

Capitals, blanks around a word, and `-` or a blank for `_` make no difference. A word that stands for either side, such
as `agent` or `customer`, is none of these: whoever wrote the rows has to say which.
"""

from __future__ import annotations

import re
from typing import Any

# The four roles of chat templates, and `call`: an assistant's turn whose text is the JSON of its tool calls.
ROLE_WORDS: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer", "system_prompt"),
    "user": ("user", "human", "prompter", "usr"),
    "assistant": (
        *("assistant", "gpt", "model", "bot", "ai", "chatgpt", "chatbot", "gpt4", "gpt_4", "gpt_3.5", "gpt3.5"),
        *("bing", "bard", "claude", "gemini", "llm", "ai_assistant"),
    ),
    "call": ("function_call", "tool_call", "functioncall", "toolcall", "function_calls", "tool_calls"),
    "tool": (
        *("tool", "observation", "function", "function_response", "tool_response", "function_result", "tool_result"),
        *("tool_output", "function_output", "functionresponse", "toolresponse", "ipython", "environment"),
    ),
}
# Columns, and keys of a turn, that are a question or an answer whoever speaks.
QUESTION_WORDS = (
    *("prompt", "question", "query", "instruction", "input", "inputs", "problem", "user", "human", "user_prompt"),
    *("user_input", "user_message", "input_text", "request"),
)
ANSWER_WORDS = (
    *("completion", "response", "answer", "output", "outputs", "reply", "solution", "target", "targets", "assistant"),
    *("assistant_response", "model_response", "output_text", "response_text", "bot"),
)
_ROLES = {word: role for role, words in ROLE_WORDS.items() for word in words}
_SEPARATORS = re.compile(r"[\s_-]+")
KNOWN_ROLES = "system, user or human, assistant or gpt, function_call, tool or observation"


def plain_word(word: str) -> str:
    """A name of a role or a column as it is compared: small letters, `_` between the parts, nothing around."""
    return _SEPARATORS.sub("_", word.strip().strip(":").strip().casefold())


def role_of(word: Any) -> str | None:
    """system, user, assistant, tool or call; None for what is no word of these."""
    return _ROLES.get(plain_word(word)) if isinstance(word, str) and len(word) < 100 else None


def said_by(key: str) -> str | None:
    """Whose words stand under this key of a turn that names no role: `human`, but also `question` or `output`."""
    word = plain_word(key)
    asked = "user" if word in QUESTION_WORDS else None
    return role_of(key) or ("assistant" if word in ANSWER_WORDS else asked)
