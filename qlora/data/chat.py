"""Conversations to tokens, with the weight of each token as a target.

The rendered text is the truth: a conversation is rendered whole by the base's own chat template, tokenized once, and
each answer is then found in that text (`spans.py`): it begins where the prompt ends that a server would send at that
point, and ends with the template's end-of-turn token, which is trained; the newline after it is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qlora.data import limits, spans
from qlora.data.formats import Conversation, Message
from qlora.data.offsets import begin_of, begun_before, ended_at, split_at, tokens_of
from qlora.data.render import Request
from qlora.data.row_json import RowError
from qlora.data.served_rows import Batch, ServedRows
from qlora.data.spans import Located
from qlora.data.template import OTHER_TEMPLATE, ChatTemplate
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
class _Rendered:
    conversation: Conversation
    located: Located


class ChatTokenizer:
    """A base's tokenizer and chat template, ready to turn conversations into rows and prompts.

    `loss_on`: "assistant" trains the answers, "all" every token but the first. `end_token_ids`: what ends an answer.
    `pad_id` fills what is masked; it is below `embedding_rows`, where these are known.
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
        self.dropped: Counter[str] = Counter()  # what the template left out of trained answers, by kind (dropped.py)
        self._sink = sink
        self._chat_template = ChatTemplate(tokenizer, sink)
        end_ids = tokenizer.convert_tokens_to_ids(self._chat_template.end_tokens)
        self.end_token_ids: tuple[int, ...] = tuple(end_ids)
        # Pads are masked by their place, never by their id. A pad token may have no embedding, or one of zeros, where
        # some norms have no gradient; the token that ends a turn is trained, and stands in every row.
        known = [token for token in end_ids if embedding_rows is None or token < embedding_rows]
        self.pad_id = known[0] if known else 0
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
        self.hidden_tools = False  # whether rows had tools that the template does not show the model
        self._noticed_tools = False
        self._served_rows = ServedRows(self._chat_template, self._check, self.dropped)

    @property
    def template(self) -> str | None:
        """The template in use, to be saved with the adapter; None for a base without one."""
        return self._chat_template.text if self._chat_template.given else None

    @property
    def templates(self) -> tuple[str, str]:
        """The templates for conversations without and with tools: what a cache of tokens depends on."""
        return self._chat_template.texts[False], self._chat_template.texts[True]

    @property
    def bounds(self) -> list[str]:
        """What renderings were stopped for so far."""
        return self._chat_template.bounds

    def tell_hidden_tools(self) -> None:
        """Say that tools are not shown to the model, once."""
        if not self._noticed_tools:
            self._noticed_tools = True
            self._sink.emit(Notice("tools", "the chat template does not show the model its tools: they are left out"))

    def as_served(self, batch: Batch, bounds: limits.TextLimits = _LIMITS) -> Batch:
        """The batch with several rows for a conversation of which the template writes an answer otherwise later."""
        return batch if self.loss_on == "all" else self._served_rows.in_batch(batch, bounds)

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
        tokens = tokens_of(self.tokenizer, [row.located.text for row in rendered if isinstance(row, _Rendered)])
        for row in rendered:
            try:
                yield row if isinstance(row, RowError) else self._row(row, *next(tokens))
            except RowError as error:
                yield error

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[int]:
        """Tokens of a conversation that the assistant is to continue. Raises RowError."""
        messages = spans.without_shut_thoughts(self._chat_template, messages)
        text = self._chat_template.render(messages, tools, add_generation_prompt=True)
        ids, _ = next(tokens_of(self.tokenizer, [text]))
        return self._with_one_bos(ids, [0.0] * len(ids))[0]

    # --- where the answers are ----------------------------------------------------------------------------------

    def _requests(self, conversation: Conversation) -> list[Request]:
        """The renderings that a conversation will want, as far as they are known beforehand."""
        if conversation.text is not None:
            return []
        if self.loss_on == "all":
            return [self._chat_template.request(conversation.messages, conversation.tools)]
        return spans.requests(self._chat_template, conversation)

    def _rendered_or_error(self, conversation: Conversation, bounds: limits.TextLimits) -> _Rendered | RowError:
        try:
            limits.check_size(conversation, bounds.row_chars)
            if conversation.text is not None:
                limits.check_rendered(conversation.text, bounds)
                return _Rendered(conversation, Located(conversation.text, (), ""))
            self._check(conversation)
            if self.loss_on == "all":
                located = Located(self._chat_template.render(conversation.messages, conversation.tools), (), "")
            else:
                located = spans.locate(self._chat_template, conversation, self.dropped)
            limits.check_rendered(located.text, bounds)
            return _Rendered(conversation, located)
        except RowError as error:
            return error

    def _check(self, conversation: Conversation) -> None:
        """Raise RowError for what the template would drop in silence, and for an answer that would end too early."""
        template = self._chat_template
        if not template.given:
            what = "the base has no chat template, and the rows are conversations"
            raise TokenizerError(what, 'add chat_template = "chatml" under [model], or a file that holds its template')
        if conversation.tools and not template.writes_tools:
            self.hidden_tools = True
            self.tell_hidden_tools()
        for message in conversation.messages:
            if "tool_calls" in message and not template.writes_calls:
                raise RowError("the chat template of this base does not write tool calls", OTHER_TEMPLATE)
            if message["role"] == "tool" and not template.writes_results:
                raise RowError("the chat template of this base does not write tool results", OTHER_TEMPLATE)
            if message["role"] == "assistant" and message.get("train", True):
                texts = (message["content"], message.get("reasoning_content", ""), str(message.get("tool_calls", "")))
                for token in template.end_tokens:
                    if any(token in text for text in texts):
                        raise RowError(f"an answer contains {token}, which ends a turn for this base: take it out")

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
            ids, weights = self._weigh(rendered.located, ids, offsets)
        ids, weights = self._with_one_bos(ids, weights)
        if not any(weights):
            raise RowError("no token of it would be trained: it has no trained assistant message")
        return TokenRow(ids, weights)

    def _weigh(self, located: Located, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[float]]:
        """Weights of the tokens; and an end token after the last answer where the template writes none."""
        borders = [turn.start for turn in located.turns if turn.template_space]
        ids, offsets = split_at(self.tokenizer, located.text, (ids, offsets), borders)
        weights = [0.0] * len(ids)
        for turn in located.turns:
            first, until = ended_at(offsets, turn.start), begun_before(offsets, turn.end)
            weights[first:until] = [1.0] * (until - first)
            for at in {first, until - 1} if first < until else ():
                end = None if turn.closed else turn.end
                if not _belongs(located.text, (begin_of(offsets, at), offsets[at][1]), turn.start, end):
                    weights[at] = 0.0
        if located.open_end is not None and not located.text[located.open_end :].strip():
            until = begun_before(offsets, located.open_end)
            end_id = self.tokenizer.convert_tokens_to_ids(located.end_token)
            return [*ids[:until], end_id], [*weights[:until], 1.0]
        return ids, weights

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
