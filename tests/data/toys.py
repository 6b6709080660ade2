"""Small tokenizers with the special tokens of six families, and conversations to render and tokenize with them.

The vocabulary is not trained but spelled out (bytes, then merges from left to right through each word below), so that
golden files do not depend on a trainer's version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation
from qlora.data.row_json import RowError
from qlora.events import Notice, Recorder

TEMPLATES = Path(__file__).parent.parent / "golden" / "templates"
WORDS = """system user assistant model tool What what is the name of The a Who How many Where weather in Oslo Paris
now It it rains sunny warm cold and today Today function functions call arguments parameters city degrees Answer
Question answer Yes No do you know help You can use these one two three wind light name get_weather object type string
properties description required content tool_call tool_response think reasoning Look up first then say ĊĊ .ĊĊ"""
# Llama 3's split: a line break joins the punctuation and the breaks before it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer has: its special tokens, and whether it puts a BOS of its own."""

    special: tuple[str, ...]
    eos: str | None
    pad: str | None = None
    bos: str | None = None
    adds_bos: bool = False
    plain: tuple[str, ...] = ()  # added tokens that are no special ones
    strips_right: bool = False
    split: str | None = None
    trims_offsets: bool = False


FAMILIES = {
    "qwen2": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|endoftext|>",
        plain=("<tool_call>", "</tool_call>"), split=LLAMA3_SPLIT,
    ),
    "qwen3": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|endoftext|>",
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"), split=LLAMA3_SPLIT,
    ),
    "llama3": Family(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"), "<|eot_id|>",
        bos="<|begin_of_text|>", adds_bos=True, split=LLAMA3_SPLIT, trims_offsets=True,
    ),
    "mistral": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", bos="<s>", adds_bos=True,
    ),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<pad>", "<bos>", adds_bos=True,
    ),
    "phi3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "<|endoftext|>",
        bos="<s>", strips_right=True,
    ),
}  # fmt: skip
CHATML = FAMILIES["qwen2"]
_CHATML_LINES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{BODY}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_tokenizer(family: Family, template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's special tokens."""
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(start + plain for plain in WORDS.split() for start in ("Ġ", "")):
        for length in range(2, len(word) + 1):
            left, right = word[: length - 1], word[length - 1]
            if word[:length] not in vocab:
                vocab[word[:length]] = len(vocab)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.split is None)
    if family.split:
        split = pre_tokenizers.Split(Regex(family.split), "isolated")
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, rstrip=family.strips_right) for token in family.special]
    tokenizer.add_tokens([*special, *(AddedToken(token, special=False) for token in family.plain)])
    _set_post_processor(tokenizer, family)
    names = {"eos_token": family.eos, "pad_token": family.pad, "bos_token": family.bos if family.adds_bos else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def _set_post_processor(tokenizer: Tokenizer, family: Family) -> None:
    steps: list[Any] = [processors.ByteLevel(trim_offsets=family.trims_offsets)]
    if family.adds_bos and family.bos:
        number = tokenizer.token_to_id(family.bos)
        steps.append(processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, number)]))
    tokenizer.post_processor = processors.Sequence(steps)


def template_of(family: str, marks: bool) -> str:
    """The family's template with its generation marks, or the same without them."""
    text = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return text if marks else re.sub(r"\n *\{%-? (end)?generation %\}", "", text)


def family_tokenizer(family: str, marks: bool = False) -> PreTrainedTokenizerFast:
    return toy_tokenizer(FAMILIES[family], template_of(family, marks))


def chatml(body: str) -> str:
    """A template like ChatML whose answers are written by `body`."""
    return _CHATML_LINES.replace(
        "{BODY}", "{% if m.role == 'assistant' %}" + body + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    )


def encode(chat: ChatTokenizer, conversation: Conversation) -> TokenRow:
    """Tokens and mask of one conversation. Raises RowError."""
    (row,) = chat.encode_many([conversation])
    if isinstance(row, RowError):
        raise row
    return row


def encode_all(chat: ChatTokenizer, conversation: Conversation) -> list[TokenRow]:
    """Tokens and masks of each row that a conversation becomes. Raises RowError."""
    return [encode(chat, row) for row in rows_of(chat, conversation)]


def rows_of(chat: ChatTokenizer, conversation: Conversation) -> list[Conversation]:
    """The rows that a conversation becomes."""
    return [row for _, row in chat.as_served([("a.jsonl:1", conversation)]) if isinstance(row, Conversation)]


def chat_of(template: str | None, family: Family = CHATML, loss_on: str = "assistant") -> ChatTokenizer:
    return ChatTokenizer(toy_tokenizer(family, template), loss_on, Recorder())


def family_chat(family: str, loss_on: str = "assistant") -> ChatTokenizer:
    return ChatTokenizer(family_tokenizer(family), loss_on, Recorder())


def trained(chat: ChatTokenizer, row: TokenRow) -> list[str]:
    """The trained stretches of a row, as text."""
    stretches: list[list[int]] = [[]]
    for token, weight in zip(row.input_ids, row.loss_weights, strict=True):
        if weight:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [chat.tokenizer.decode(stretch) for stretch in stretches if stretch]


def notices(chat: ChatTokenizer, topic: str) -> list[Notice]:
    sink = chat._sink
    assert isinstance(sink, Recorder)
    return [event for event in sink.events if isinstance(event, Notice) and event.topic == topic]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, number: int = 0, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return assistant("", tool_calls=[{"type": "function", "id": f"call{number:05d}", "function": function}])


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05d}"}


def talk(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] | None = None) -> Conversation:
    return Conversation(messages, tools)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Case:
    """A conversation of the golden files, made anew for each test."""

    name: str
    make: Callable[[], Conversation] = field(repr=False)


CASES = (
    Case("one turn", lambda: talk(user("What is it?"), assistant("It is cold."))),
    Case(
        "three turns, one of them context only",
        lambda: talk(
            user("How many?"),
            assistant("Three."),
            user("Where?"),
            assistant("In Oslo.\n\nAnd Paris.", train=False),
            user("Now?"),
            assistant("Ça va: 23°C 🌧 \n"),
        ),
    ),
    Case(
        "system",
        lambda: talk(system("You help."), user("Who?"), assistant("The model."), user("What?"), assistant("\n{\n}")),
    ),
    Case(
        "tool call and result",
        lambda: talk(
            user("Weather in Oslo?"),
            call("get_weather", city="Oslo"),
            result('{"degrees": 3}'),
            assistant("It is cold."),
            user("And Paris?"),
            call("get_weather", 1, city="Paris"),
            result('{"degrees": 23}', 1),
            assistant("It is warm."),
            tools=(WEATHER,),
        ),
    ),
    Case(
        "reasoning",
        lambda: talk(
            user("What is it?"),
            assistant("It rains.", reasoning_content="Look up first."),
            user("Now?"),
            assistant("Yes.", reasoning_content="It rains now."),
        ),
    ),
)
