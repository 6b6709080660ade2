"""The base's chat template: which one it is, what it writes, and conversations rendered by it.

Templates come with the base: a stranger's programs, rendered in a bounded process of their own (`render.py`). What a
template does is not guessed from its source but seen from small conversations rendered once at the start: which token
ends a turn, and whether tools, calls and results are written at all (some templates drop them in silence).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora import chatml
from qlora.data.formats import Message
from qlora.data.render import Rendered, Renderer, request_text
from qlora.data.row_json import RowError
from qlora.errors import TokenizerError
from qlora.events import Notice, Sink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[dict[str, Any]]

# Llama 3's template writes the day of rendering unless it is given one. Rows must not depend on the day on which they
# are tokenized, or a resumed run could see others; this is the template's own default.
DATE_STRING = "26 Jul 2024"
# The largest template known to us has 20 kB (gpt-oss); one that is far larger is no template.
MAX_TEMPLATE_CHARS = 1 << 20
# Names that a message's reasoning goes by. Templates read the first one, gpt-oss's read the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Private-use characters: they stand in no template, survive trimming, and differ from an answer's first character.
PLACEHOLDERS = ("\ue0a1ANSWER\ue0a1", "\ue0b2ANSWER\ue0b2")
_QUESTION: Message = {"role": "user", "content": "Question?"}
_CALL_ID = "call00000"
_NO_PARAMETERS = {"description": "", "parameters": {"type": "object", "properties": {}}}
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The template in use. `texts`: by whether there are tools. `end_tokens`: the turn's own end first, then EOS.

    `given`: whether the tokenizer has one; without it, rows of plain text can be trained and no conversations.

    Raises TokenizerError when there is no such token, or the template cannot render even one question and answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sink: Sink) -> None:
        self._special_tokens = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t)]
        eos = [str(tokenizer.eos_token)] if tokenizer.eos_token is not None else []
        self.given = bool(tokenizer.chat_template)
        self.texts = _choose(tokenizer, eos)
        if max(map(len, self.texts.values())) > MAX_TEMPLATE_CHARS:
            raise TokenizerError("the base's chat template has more than a million characters", "use another base")
        # A template that stands for both is compiled once.
        distinct = list(dict.fromkeys(self.texts.values()))
        self._numbers = {tools: distinct.index(text) for tools, text in self.texts.items()}
        self._renderer = Renderer(distinct, {"date_string": DATE_STRING, **tokenizer.special_tokens_map})
        self._marked = {tools: bool(_GENERATION_MARK.search(text)) for tools, text in self.texts.items()}
        turn_ends = self._find_turn_ends()
        self.writes_end = bool(turn_ends)
        self.end_tokens = list(dict.fromkeys(turn_ends + eos))
        if not self.end_tokens:
            raise _no_end_token()
        if not self.writes_end:
            message = f"the chat template ends no turn with a token: {self.end_tokens[0]} is added to each row's end"
            sink.emit(Notice("template", message))
        self.writes_calls, self.writes_results, self.writes_tools = self._find_tool_support()

    @property
    def text(self) -> str:
        """The template's source, as it is saved with an adapter."""
        return self.texts[False]

    def has_marks(self, tools: Tools | None) -> bool:
        """Whether the template marks answers with {% generation %}."""
        return self._marked[bool(tools)]

    def render(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """The conversation as the base reads it. Raises RowError with the template's own message."""
        return self._renderer.render(self.request(messages, tools, add_generation_prompt)).text

    def render_marked(self, messages: Sequence[Message], tools: Tools | None) -> Rendered:
        """Text, and the spans of characters inside generation marks (none for a template without marks)."""
        return self._renderer.render(self.request(messages, tools))

    def render_ahead(self, requests: Sequence[str]) -> None:
        """Render many `request`s at once: the calls of `render` and `render_marked` that follow find their answers."""
        self._renderer.ask_ahead(requests)

    def request(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """What the rendering process is asked: all that the text depends on."""
        values = {
            "messages": [_as_templates_read_it(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return request_text(self._numbers[bool(tools)], values)

    def _find_turn_ends(self) -> list[str]:
        """The special tokens with which this template ends an answer and, where that differs, a tool call."""
        here = PLACEHOLDERS[0]
        try:
            text = self.render([_QUESTION, {"role": "assistant", "content": here}], None)
        except RowError as error:
            raise TokenizerError(f"the base's chat template fails: {error.reason}", "use another base") from None
        after = text.rpartition(here)[2]
        specials = self._specials_in(after)
        if not specials or after[: after.index(specials[0])].strip():
            return []
        # Llama 3.1 ends some calls with <|eom_id|>. Other special tokens may close the call's parts: the last counts.
        with_call = self._try([_QUESTION, _call(here)], None) or ""
        after_call = self._specials_in(with_call.rpartition(here)[2])
        return specials[:1] if not after_call or specials[0] in after_call else [specials[0], after_call[-1]]

    def _find_tool_support(self) -> tuple[bool, bool, bool]:
        """Whether calls, results and tools are written; a refusal counts as yes, since its message meets the row."""
        here, there = PLACEHOLDERS
        result: Message = {"role": "tool", "content": there, "name": here, "tool_call_id": _CALL_ID}
        with_call = self._try([_QUESTION, _call(here)], None)
        with_result = self._try([_QUESTION, _call(here), result], None)
        with_tools = self._try([_QUESTION], [{"type": "function", "function": {"name": there, **_NO_PARAMETERS}}])
        pairs = ((here, with_call), (there, with_result), (there, with_tools))
        calls, results, written_tools = (text is None or mark in text for mark, text in pairs)
        return calls, results, written_tools

    def _try(self, messages: Sequence[Message], tools: Tools | None) -> str | None:
        try:
            return self.render(messages, tools)
        except RowError:
            return None

    def _specials_in(self, text: str) -> list[str]:
        """The special tokens in `text`, in their order; of two that begin together only the longer."""
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        return re.findall("|".join(map(re.escape, longest_first)), text) if longest_first else []


def _as_templates_read_it(message: Message) -> Message:
    """Without our own key, and with the reasoning under the names that templates read it by (as transformers does)."""
    plain = {key: value for key, value in message.items() if key != "train"}
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _call(name: str) -> Message:
    call = {"type": "function", "id": _CALL_ID, "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _choose(tokenizer: PreTrainedTokenizerBase, eos: list[str]) -> dict[bool, str]:
    """The template for conversations without and with tools; ChatML stands in for none, and renders no row."""
    if tokenizer.chat_template:
        try:
            # Of several named templates transformers picks `tool_use`, if there is one, when tools are given.
            return {False: tokenizer.get_chat_template(), True: tokenizer.get_chat_template(tools=[{}])}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise TokenizerError(f"the base's chat template: {error}", "use another base") from None
    ends = [chatml.END] if chatml.END in tokenizer.get_vocab() else eos
    if not ends:
        raise _no_end_token()
    return dict.fromkeys((False, True), chatml.template(ends[0]))


def _no_end_token() -> TokenizerError:
    what = "the base's tokenizer has no token that ends an answer: the model could never stop"
    return TokenizerError(what, "set eos_token in the base's tokenizer_config.json, or use another base")
