"""Conversations to tokens, with the weight of each token as a target.

The rendered text is the truth: a conversation is rendered whole by the base's own chat template, tokenized once, and
each answer is then found in that text. Where it begins comes from the template's `{% generation %}` marks, else
from the prompt that a server would send at that point (rendered with `add_generation_prompt`). Some templates rewrite
the history (Mistral's move the system prompt, Qwen3's drop old reasoning), so that this prompt is no beginning of the
text: then its last message is looked for, else the answer is replaced by a placeholder. An answer ends with the
template's end-of-turn token, which is trained; the newline after it is not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qlora.data import limits
from qlora.data.formats import Conversation, Message
from qlora.data.offsets import tokens_of
from qlora.data.row_json import RowError
from qlora.data.template import PLACEHOLDERS, ChatTemplate, Tools
from qlora.errors import TokenizerError
from qlora.events import Notice, Sink, Sinks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 64  # rendered ahead in one go, and tokenized in one call
_LIMITS = limits.TextLimits()


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a row, and the weight of each token AS A TARGET (not shifted). 0.0 is not trained."""

    input_ids: list[int]
    loss_weights: list[float]


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn in the rendered text, in characters.

    `limit`: where the next one begins; nothing of this one lies there. `end`: where a generation mark closes.
    """

    message: int
    start: int
    limit: int
    end: int | None
    trained: bool


@dataclass(frozen=True)
class _Rendered:
    conversation: Conversation
    text: str
    turns: tuple[_Turn, ...]


class ChatTokenizer:
    """A base's tokenizer and chat template, ready to turn conversations into rows and prompts.

    `loss_on`: "assistant" trains the answers, "all" every token but the first. `end_token_ids`: what ends an answer.
    `pad_id` is below `embedding_rows`, where these are known.
    Raises TokenizerError when no token ends an answer, when the tokenizer is no fast one (offsets are needed), or
    when the template cannot render even one question and answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: str, sink: Sink, embedding_rows: int | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise TokenizerError(
                "the base has no fast tokenizer, so that answers cannot be found exact to the token",
                "use a base with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.lost_reasoning = 0  # trained answers whose reasoning the template left out of the history
        self._sink = sink
        self._chat_template = ChatTemplate(tokenizer, sink)
        end_ids = tokenizer.convert_tokens_to_ids(self._chat_template.end_tokens)
        self.end_token_ids: tuple[int, ...] = tuple(end_ids)
        pad = tokenizer.pad_token_id
        self.pad_id = self.end_token_ids[-1] if pad is None else int(pad)  # pads are masked by place, never by id
        if embedding_rows is not None and self.pad_id >= embedding_rows:
            self.pad_id = 0  # every embedding has one
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
        self._noticed_tools = False

    @property
    def template(self) -> str | None:
        """The template in use, to be saved with the adapter; None for a base without one."""
        return self._chat_template.text if self._chat_template.given else None

    @property
    def templates(self) -> tuple[str, str]:
        """The templates for conversations without and with tools: what a cache of tokens depends on."""
        return self._chat_template.texts[False], self._chat_template.texts[True]

    def encode_many(
        self, conversations: Sequence[Conversation], bounds: limits.TextLimits = _LIMITS
    ) -> list[TokenRow | RowError]:
        """Tokens and masks of conversations; in a bad one's place stands its RowError, beyond `bounds` a RowTooLong."""
        chunks = [*limits.chunks(conversations, _CHUNK_ROWS), ()]
        self._render_ahead(chunks[0])
        rows: list[TokenRow | RowError] = []
        for chunk, following in pairwise(chunks):
            rendered = [self._rendered_or_error(item, bounds) for item in chunk]
            # The next chunk is rendered by its own process while this one is tokenized here.
            self._render_ahead(following)
            rows += self._rows(rendered)
        return rows

    def _render_ahead(self, conversations: Sequence[Conversation]) -> None:
        if len(conversations) == 1 and limits.rendered_chars(conversations[0]) > limits.CHUNK_CHARS:
            conversations = ()  # each rendering of it when it is wanted: never more than one is held
        self._chat_template.render_ahead([text for item in conversations for text in self._requests(item)])

    def _rows(self, rendered: Sequence[_Rendered | RowError]) -> Iterator[TokenRow | RowError]:
        tokens = tokens_of(self.tokenizer, [row.text for row in rendered if isinstance(row, _Rendered)])
        for row in rendered:
            try:
                yield row if isinstance(row, RowError) else self._row(row, *next(tokens))
            except RowError as error:
                yield error

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """Tokens of a conversation that the assistant is to continue. Raises RowError."""
        text = self._chat_template.render(messages, tools, add_generation_prompt=True)
        ids, _ = next(tokens_of(self.tokenizer, [text]))
        return self._with_one_bos(ids, [0.0] * len(ids))[0]

    # --- where the answers are ----------------------------------------------------------------------------------

    def _requests(self, conversation: Conversation) -> Iterator[str]:
        """The renderings that `_locate` will want of a conversation, as far as they are known beforehand."""
        messages, tools = conversation.messages, conversation.tools
        if conversation.text is not None:
            return
        template = self._chat_template
        yield template.request(messages, tools)
        if self.loss_on != "all" and not template.has_marks(tools):
            for number, message in enumerate(messages):
                if message["role"] == "assistant":
                    yield template.request(messages[:number], tools, add_generation_prompt=True)

    def _rendered_or_error(self, conversation: Conversation, bounds: limits.TextLimits) -> _Rendered | RowError:
        try:
            limits.check_size(conversation, bounds.row_chars)
            if conversation.text is not None:
                limits.check_rendered(conversation.text, bounds)
                return _Rendered(conversation, conversation.text, ())
            self._check(conversation)
            rendered = self._locate(conversation)
            limits.check_rendered(rendered.text, bounds)
            return rendered
        except RowError as error:
            return error

    def _check(self, conversation: Conversation) -> None:
        """Raise RowError for what the template would drop in silence, and for an answer that would end too early."""
        template = self._chat_template
        if not template.given:
            what = "the base has no chat template, and the rows are conversations"
            raise TokenizerError(what, 'add chat_template = "chatml" under [model], or a file that holds its template')
        if conversation.tools and not template.writes_tools and not self._noticed_tools:
            self._noticed_tools = True
            self._sink.emit(Notice("tools", "the chat template does not show the model its tools: they are left out"))
        for message in conversation.messages:
            if "tool_calls" in message and not template.writes_calls:
                raise RowError("the chat template of this base does not write tool calls")
            if message["role"] == "tool" and not template.writes_results:
                raise RowError("the chat template of this base does not write tool results")
            if message["role"] == "assistant" and message.get("train", True):
                texts = (message["content"], message.get("reasoning_content", ""), str(message.get("tool_calls", "")))
                for token in template.end_tokens:
                    if any(token in text for text in texts):
                        raise RowError(f"an answer contains {token}, which ends a turn for this base: take it out")

    def _locate(self, conversation: Conversation) -> _Rendered:
        messages, tools = conversation.messages, conversation.tools
        if self.loss_on == "all":
            return _Rendered(conversation, self._chat_template.render(messages, tools), ())
        text, marks = self._chat_template.render_marked(messages, tools)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [bool(messages[number].get("train", True)) for number in answers]
        ends: list[int | None] = [None] * len(answers)
        if marks and answers and (len(marks) == len(answers) or all(trained)):
            starts, ends = [start for start, _ in marks], [end for _, end in marks]
            if len(marks) != len(answers):
                # The template marks an answer's parts one by one: then marks and messages have no common numbers.
                answers, trained = [answers[-1]] * len(marks), [True] * len(marks)
        else:
            starts = []
            for number in answers:
                starts.append(self._start(conversation, text, number, starts[-1] if starts else 0))
        limits = [*starts, len(text)][1:]
        if any(start >= limit for start, limit in zip(starts, limits, strict=True)):
            raise RowError("the answers cannot be told apart in the rendered text")
        return _Rendered(conversation, text, tuple(map(_Turn, answers, starts, limits, ends, trained)))

    def _start(self, conversation: Conversation, text: str, number: int, previous_start: int) -> int:
        """Where answer `number` begins: after the prompt that a server would send for it."""
        messages, tools = conversation.messages[:number], conversation.tools
        try:
            prompt = self._chat_template.render(messages, tools, add_generation_prompt=True)
            if prompt and text.startswith(prompt):
                return len(prompt)
            tail = self._tail(prompt, messages, tools)
        except RowError:
            tail = ""  # the template wants more messages than these
        place = text.find(tail, previous_start) if tail else -1
        return place + len(tail) if place >= 0 else self._span_by_replacing(conversation, text, number)[0]

    def _tail(self, prompt: str, messages: Sequence[Message], tools: Tools | None) -> str:
        """The end of a prompt, from the content of its last message on; "" where that is unclear. Raises RowError."""
        if not prompt or not messages or not messages[-1]["content"].strip():
            return ""
        replaced = [*messages[:-1], {**messages[-1], "content": PLACEHOLDERS[0]}]
        other = self._chat_template.render(replaced, tools, add_generation_prompt=True)
        before, found, after = other.rpartition(PLACEHOLDERS[0])
        return prompt[len(before) :] if found and prompt.startswith(before) and prompt.endswith(after) else ""

    def _span_by_replacing(self, conversation: Conversation, text: str, number: int) -> tuple[int, int]:
        """Characters of answer `number`, from rendering the conversation with a placeholder in its place."""
        answer = conversation.messages[number]
        placeholder = next(p for p in PLACEHOLDERS if p[0] != answer["content"][:1])
        stand_in = {"role": "assistant", "content": placeholder}
        messages = [stand_in if at == number else message for at, message in enumerate(conversation.messages)]
        other = self._chat_template.render(messages, conversation.tools)
        before, found, after = other.partition(placeholder)
        if not found or not text.startswith(before) or not text.endswith(after) or placeholder in after:
            raise RowError(f"answer {number} is not found in the rendered text: the chat template rewrites it")
        return len(before), len(text) - len(after)

    # --- tokens -------------------------------------------------------------------------------------------------

    def _row(self, rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> TokenRow:
        if rendered.conversation.text is not None:
            eos = self.tokenizer.eos_token_id
            ids = [*ids, self.end_token_ids[0] if eos is None else eos]
            weights = [1.0] * len(ids)
        elif self.loss_on == "all":
            ids = [*ids] if self._chat_template.writes_end else [*ids, self.end_token_ids[0]]
            weights = [1.0] * len(ids)
        else:
            ids, weights = self._weigh(rendered, ids, offsets)
        ids, weights = self._with_one_bos(ids, weights)
        if not any(weights):
            raise RowError("no token of it would be trained: it has no trained assistant message")
        return TokenRow(ids, weights)

    def _weigh(
        self, rendered: _Rendered, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[float]]:
        """Weights of the tokens; and an end token after the last answer where the template writes none."""
        ends = [end for _, end in offsets]
        # Tokenizers that trim offsets leave a token of spaces no width, at its end: it begins where the last one ended.
        begins = [begin if begin < end or not at else ends[at - 1] for at, (begin, end) in enumerate(offsets)]
        weights = [0.0] * len(ids)
        open_end = None
        for turn in rendered.turns:
            if not turn.trained:
                continue
            first = bisect_right(ends, turn.start)
            stop = self._end_token(rendered.text, turn, ids[first : bisect_left(begins, turn.limit)], begins[first:])
            if stop is None:
                open_end = self._open_end(rendered, turn)
                until = bisect_left(begins, open_end)
            else:
                open_end, until = None, first + stop + 1
            weights[first:until] = [1.0] * (until - first)
            for at in {first, until - 1} if first < until else ():
                if not _belongs(rendered.text, (begins[at], ends[at]), turn.start, open_end):
                    weights[at] = 0.0
            self._count_reasoning(rendered, turn)
        if open_end is not None and not rendered.text[open_end:].strip():
            until = bisect_left(begins, open_end)
            return [*ids[:until], self.end_token_ids[0]], [*weights[:until], 1.0]
        return ids, weights

    def _end_token(self, text: str, turn: _Turn, ids: list[int], begins: list[int]) -> int | None:
        """Number of the token among `ids` that ends the turn; with a mark it stands in it or right behind it."""
        for number, token in enumerate(ids):
            if token in self.end_token_ids:
                behind = turn.end is not None and text[turn.end : begins[number]].strip()
                return None if behind else number
        return None

    def _open_end(self, rendered: _Rendered, turn: _Turn) -> int:
        """Where a turn ends that no token ends."""
        if turn.end is None:
            return self._span_by_replacing(rendered.conversation, rendered.text, turn.message)[1]
        return turn.start + len(rendered.text[turn.start : turn.end].rstrip())

    def _count_reasoning(self, rendered: _Rendered, turn: _Turn) -> None:
        message = rendered.conversation.messages[turn.message]
        thought, ended, _ = message["content"].partition("</think>")
        within = thought.removeprefix("<think>") if ended else ""
        reasoning = message.get("reasoning_content", within).strip()
        if reasoning not in rendered.text[turn.start : turn.limit]:
            self.lost_reasoning += 1

    def _with_one_bos(self, ids: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
        """One BOS where the template or the tokenizer puts any; no weight on a first token: nothing predicts it."""
        bos = self.tokenizer.bos_token_id
        given = next((at for at, token in enumerate(ids) if token != bos), len(ids))
        if bos is not None and (given or self._adds_bos):
            return [bos, *ids[given:]], [0.0, *weights[given:]]
        return ids, [0.0, *weights[1:]] if weights else []


def _belongs(text: str, token: tuple[int, int], start: int, end: int | None) -> bool:
    """Whether a token on the border of an answer (`end` None: its end token is the border) is part of it.

    A token that reaches over the border must carry visible text of the answer: a newline of the header that the
    tokenizer joined with one of the answer is the prompt's.
    """
    begin, stop = token
    inside = begin >= start and (end is None or stop <= end)
    return inside or bool(text[max(begin, start) : stop if end is None else min(stop, end)].strip())


@dataclass(frozen=True)
class ChatFormat:
    """How a trained model reads and stops: its tokenizer, its chat template, and the ids that end an answer.

    A base without an end token has no template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    end_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        try:
            template = ChatTemplate(tokenizer, Sinks())
        except TokenizerError:
            return cls(tokenizer, None, ())
        end_ids = tuple(tokenizer.convert_tokens_to_ids(template.end_tokens))
        return cls(tokenizer, template if template.given else None, end_ids)
