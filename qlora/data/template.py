"""The base's chat template: which one it is, what it writes, and conversations rendered by it.

Templates come with the base: a stranger's programs, rendered in a bounded process of their own (`render.py`). What a
template does is not guessed from its source but seen from small conversations rendered once at the start
(`template_facts.py`), and in which shape it takes a tool call (`call_shapes.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora import chatml
from qlora.data.call_shapes import (
    KINDS,
    SHAPES,
    Reading,
    Shapes,
    best_shape,
)
from qlora.data.call_shapes import (
    PLACEHOLDERS as PLACEHOLDERS,  # the export asks for it beside the template
)
from qlora.data.formats import Message
from qlora.data.message_pieces import MessagePieces
from qlora.data.render import Rendered, Renderer, Request, request_of
from qlora.data.render_worker import DAY
from qlora.data.row_json import RowError
from qlora.data.template_facts import QUESTION, answer, call, find_ends, find_facts, find_inline_thoughts, result
from qlora.errors import TokenizerError
from qlora.events import Notice, Sink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[dict[str, Any]]

# Llama 3's template writes the day of rendering unless it is given one; this is the template's own default.
DATE_STRING = DAY.strftime("%d %b %Y")
# The largest template known to us has 20 kB (gpt-oss); one that is far larger is no template.
MAX_TEMPLATE_CHARS = 1 << 20
_TOOL = {
    "type": "function",
    "function": {
        "name": PLACEHOLDERS[1],
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
# The way out where the template is what stands in a row's way.
OTHER_TEMPLATE = "give a template that does (chat_template, a file, under [model]), or leave such rows out"
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
        self._pieces = MessagePieces()
        self.reading = Reading()
        self._probe_tools: Tools | None = None
        text, marks = self._render_one_answer()
        self.writes_calls = self._find_shapes()
        knows_think = any("<think>" in text for text in (*self.texts.values(), *tokenizer.get_added_vocab()))
        inline_thoughts = find_inline_thoughts(self._try, knows_think)
        self.reading = replace(self.reading, inline_thoughts=inline_thoughts)
        self.ends = find_ends(self._try, self._special_tokens, eos[0] if eos else None, text)
        self.writes_end = bool(self.ends.answer)
        self.end_tokens = list(dict.fromkeys(self.ends.all + eos))
        if not self.end_tokens:
            raise _no_end_token()
        if not self.writes_end:
            message = f"the chat template ends no turn with a token: {self.end_tokens[0]} is added to each row's end"
            sink.emit(Notice("template", message))
        self.facts = find_facts(self._try, self.end_tokens, marks)
        self.writes_results, self.writes_tools = self._find_tool_support()

    @property
    def text(self) -> str:
        """The template's source, as it is saved with an adapter."""
        return self.texts[False]

    @property
    def bounds(self) -> list[str]:
        """What renderings were stopped for so far: the template's bounds that it left."""
        return self._renderer.bounds

    def has_marks(self, tools: Tools | None) -> bool:
        """Whether the template marks answers with {% generation %}, from where the serving prompt ends on.

        Marks that hold the header too (SmolLM3's, some training templates') would train what the server writes.
        """
        return self._marked[bool(tools)] and self.facts.marks_begin_answers

    def render(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False) -> str:
        """The conversation as the base reads it. Raises RowError with the template's own message."""
        return self._renderer.render(self.request(messages, tools, add_generation_prompt)).text

    def render_marked(self, messages: Sequence[Message], tools: Tools | None) -> Rendered:
        """Text, and the spans of characters inside generation marks (none for a template without marks)."""
        return self.rendered(self.request(messages, tools))

    def rendered(self, request: Request) -> Rendered:
        """As `render_marked`, of a request."""
        return self._renderer.render(request)

    def render_ahead(self, requests: Sequence[Request]) -> None:
        """Render many `request`s at once: the calls of `render` and `rendered` that follow find their answers."""
        self._renderer.ask_ahead(requests)

    def request(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False) -> Request:
        """What the rendering process is asked: all that the text depends on."""
        written = {
            "tools": self._pieces.of_tools(tools) if tools else "null",
            "documents": "null",
            "add_generation_prompt": "true" if add_generation_prompt else "false",
            "messages": self._pieces.of(messages, self.reading),
        }
        return request_of(self._numbers[bool(tools)], {}, written)

    def _render_one_answer(self) -> Rendered:
        """A question and an answer; with content as parts where a template for images takes it no other way."""
        errors: list[str] = []
        for reading in (Reading(), Reading(parts=True), Reading()):
            self.reading = reading
            try:
                rendered = self.render_marked([QUESTION, answer()], None)
            except RowError as error:
                errors.append(error.reason)
                if self.bounds:
                    break  # it was stopped: trying it otherwise gives it more of the machine
                continue
            if PLACEHOLDERS[0] in rendered.text:
                return rendered
        if not errors:
            return rendered
        hint = 'give another one: chat_template = "chatml" or a file, under [model]'
        raise TokenizerError(f"the chat template fails: {errors[0]}", hint)

    def _find_shapes(self) -> bool:
        """Find the shape in which calls are written, and whether they are in any; a refusal of all counts as yes.

        Its message then meets the row. Some templates write calls only where tools are given.
        """
        plain, *others = KINDS
        refused = True
        # One that does not name the key can write calls only with the message as a whole.
        shapes = SHAPES if any("tool_calls" in text for text in self.texts.values()) else SHAPES[:1]
        for self._probe_tools in (None, [_TOOL]):
            shape, written = best_shape(plain, QUESTION, self._try_shapes, shapes)
            if written:
                alike = [replace(shape, content=content) for content in dict.fromkeys(s.content for s in SHAPES)]
                found = {kind: best_shape(kind, QUESTION, self._try_shapes, alike)[0] for kind in others}
                self.reading = replace(self.reading, shapes={plain: shape, **found})
                return True
            refused = refused and written is None
        self._probe_tools = None
        return refused

    def _try_shapes(self, messages: Sequence[Message], shapes: Shapes) -> str | None:
        before = self.reading
        self.reading = replace(before, shapes=shapes)
        text = self._try(messages)
        self.reading = before
        return text

    def _find_tool_support(self) -> tuple[bool, bool]:
        """Whether results and tools are written; a refusal counts as yes, since its message meets the row."""
        here, there = PLACEHOLDERS
        with_result = self._try([QUESTION, call(here), result(there)])
        self._probe_tools = [_TOOL]
        with_tools = self._try([QUESTION])
        return with_result is None or there in with_result, with_tools is None or there in with_tools

    def _try(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        try:
            return self.render(messages, self._probe_tools, add_generation_prompt)
        except RowError:
            return None


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
