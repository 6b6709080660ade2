"""Ollama's Modelfile beside a GGUF: where the weights are, where an answer ends, how a conversation is written.

Format: docs/modelfile.mdx and parser/parser.go of Ollama. Its TEMPLATE is Go's text/template, not Jinja, so that the
trained chat template cannot be copied. It is recognised instead: small conversations are rendered by it, and compared
with what the families that we know would write. Only prompts are compared (conversations that end with a question),
since that is all that a server ever renders.

The template is written over `.Messages`, not as `{{ .System }} {{ .Prompt }} {{ .Response }}`: Ollama runs that older
form once a turn, which cannot say that a family puts the system prompt before the last question (Mistral) or has a
system prompt of its own where none is given (Qwen 2.5). Tools are left out: Ollama offers tools for a template that
mentions `.Tools`, and reads calls back by that text; without it, it refuses a request with tools, which is better than
calls written in another form than the trained one. The BOS token is left to llama.cpp where the GGUF says that it is
added: written as well, it would stand there twice.

Go has no trim function: where a template trims messages, blanks around a user's words stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora.data.formats import Message
from qlora.data.row_json import RowError
from qlora.data.template import ChatTemplate

# Ollama's own num_ctx below 24 GiB of GPU memory (docs/context-length.mdx): less would cut off more than Ollama does.
USUAL_CONTEXT_TOKENS = 4096
MAX_NAME_CHARS = 80  # of 128 that types/model/name.go allows for all parts of a name together

_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_TALK: list[Message] = [
    {"role": "assistant" if at % 2 else "user", "content": text}
    for at, text in enumerate(("Who is there?", "A friend.", "And now?", "Two of them.", "Why?"))
]
_PLAIN = [_TALK[:turns] for turns in (1, 3, 5)]
_REASONED: Message = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA friend."}


# --- the families -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How a family writes a conversation.

    user, answer  what stands before and after the words of a turn
    system        the same for a system prompt with a turn of its own
    joined        without one: the question that the system prompt is put before, with an empty line between

    A prompt ends with what stands before an answer, but for its blanks (Mistral's models write them), and possibly more
    (Qwen's thinking models go on with <think>).
    """

    label: str
    user: tuple[str, str]
    answer: tuple[str, str]
    system: tuple[str, str] | None = None
    joined: Literal["first", "last"] = "first"


def families(end: str) -> tuple[Family, ...]:
    """The families that we know, where the token `end` ends a turn.

    From the chat templates that the models were published with. Mistral's versions differ in blanks, which are tokens,
    and in the place of the system prompt ("concept deep dive: tokenization" in Mistral's cookbook lists them).
    """
    line = f"{end}\n"
    im_start, header = "<|im_start|>{}\n".format, "<|start_header_id|>{}<|end_header_id|>\n\n".format
    return (
        Family("ChatML", (im_start("user"), line), (im_start("assistant"), line), (im_start("system"), line)),
        Family("Llama 3", (header("user"), end), (header("assistant"), end), (header("system"), end)),
        Family("Gemma", ("<start_of_turn>user\n", line), ("<start_of_turn>model\n", line)),
        Family("Phi-3", ("<|user|>\n", line), ("<|assistant|>\n", line), ("<|system|>\n", line)),
        Family("Phi-4-mini", ("<|user|>", end), ("<|assistant|>", end), ("<|system|>", end)),
        Family("Mistral v1", ("[INST] ", " [/INST]"), ("", end)),
        Family("Mistral v1", ("[INST] ", " [/INST]"), ("", f"{end} ")),
        Family("Mistral v1", (" [INST] ", " [/INST]"), (" ", end)),
        Family("Mistral v3", ("[INST] ", "[/INST]"), (" ", end), joined="last"),
        Family("Mistral v3-tekken", ("[INST]", "[/INST]"), ("", end), joined="last"),
        Family("Mistral v7", ("[INST] ", "[/INST]"), (" ", end), ("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]")),
        Family("Mistral v7-tekken", ("[INST]", "[/INST]"), ("", end), ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    )


@dataclass(frozen=True)
class _Dialect:
    """A family as one model writes it: with what was seen in the renderings and is no part of the family."""

    family: Family
    start: str  # the BOS token, where the template writes it
    opening: str
    system_before: str  # stands in a system turn before the given text, such as Llama 3.1's date
    system_default: str | None  # the whole of that turn when none is given

    def prompt(self, messages: Sequence[Message]) -> str:
        """What this dialect writes for a conversation, in Python: `_go_text` writes the same in Go."""
        given = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = messages if given is None else messages[1:]
        text, joined_at = self.start, None
        if self.family.system is None:
            joined_at = 0 if self.family.joined == "first" else len(turns) - 1
        elif (words := self.system_default if given is None else self.system_before + given) is not None:
            text += self.family.system[0] + words + self.family.system[1]
        for at, message in enumerate(turns):
            before, after = self.family.user if message["role"] == "user" else self.family.answer
            join = f"{given}\n\n" if given is not None and at == joined_at else ""
            text += before + join + message["content"] + after
        return text + self.opening


@dataclass(frozen=True)
class GoTemplate:
    """A chat template in Go's syntax, which family it is of, and how far Jinja's goes beyond it."""

    label: str
    text: str
    trims: bool  # the trained template trims messages
    takes_system: bool
    drops_reasoning: bool  # of earlier answers


def go_template(chat: ChatTemplate, bos: str | None, adds_bos: bool) -> GoTemplate | None:
    """The trained template in Go's syntax; None when it is of no family that we know.

    `bos`: the tokenizer's BOS token. `adds_bos`: whether the GGUF says that llama.cpp adds it.
    """

    def render(messages: Sequence[Message]) -> str | None:
        try:
            return chat.render(messages, None, add_generation_prompt=True)
        except RowError:
            return None

    first = render(_PLAIN[0])
    if first is None:
        return None
    start = bos if bos and first.startswith(bos) else ""
    with_system = render([_SYSTEM, *_PLAIN[0]])
    cases = [*_PLAIN, *([_SYSTEM, *messages] for messages in _PLAIN)]
    rendered = [(messages, render(messages)) for messages in cases]
    # A refusal is right only where the template takes no system prompt at all (Gemma 2).
    rendered = [(messages, text) for messages, text in rendered if text is not None or messages[0] is not _SYSTEM]
    for family in families(chat.end_tokens[0]):
        dialect = _learn(family, start, first, with_system)
        if dialect is not None and all(dialect.prompt(messages) == text for messages, text in rendered):
            reasoned = render([_TALK[0], _REASONED, _TALK[2]])
            return GoTemplate(
                label=family.label,
                text=_go_text(dialect, "" if adds_bos else start),
                trims=" x " not in (render([{"role": "user", "content": "  x  "}]) or ""),
                takes_system=with_system is not None,
                drops_reasoning=reasoned is not None and str(_REASONED["content"]) not in reasoned,
            )
    return None


def _learn(family: Family, start: str, first: str, with_system: str | None) -> _Dialect | None:
    """What one question, without and with a system prompt, shows of a family; None when it is not of this one."""
    question = family.user[0] + str(_TALK[0]["content"]) + family.user[1]
    ahead, found, opening = first.removeprefix(start).rpartition(question)
    if not found or not opening.startswith(family.answer[0].strip(" ")):
        return None
    before, default = "", None
    if family.system is not None:
        opens, closes = family.system
        if ahead.startswith(opens) and ahead.endswith(closes):
            default = ahead[len(opens) : len(ahead) - len(closes)]
        if with_system is not None:
            turn = with_system.removeprefix(start).partition(str(_SYSTEM["content"]))[0]
            before = turn.removeprefix(opens)
    return _Dialect(family, start, opening, before, default)


def _go_text(dialect: _Dialect, start: str) -> str:
    """The dialect in Go's text/template. No trim markers ({{-): they would eat a family's own line breaks."""
    family, plain = dialect.family, _go_literal
    text, turns, loop, join = plain(start), "", "range .Messages", ""
    if family.system is not None:
        before, after = family.system
        if dialect.system_default is not None:
            text += "{{ if not .System }}" + plain(before + dialect.system_default + after) + "{{ end }}"
        turns = '{{ if eq .Role "system" }}' + plain(before + dialect.system_before) + "{{ .Content }}" + plain(after)
        turns += "{{ else if "
    else:
        # A system prompt is always the first message: the first question is message 0 or 1.
        place = "le $i 1" if family.joined == "first" else "eq (len (slice $.Messages $i)) 1"
        loop, turns = "range $i, $_ := .Messages", "{{ if "
        join = "{{ if and $.System (" + place + ") }}{{ $.System }}\n\n{{ end }}"
    before, after = family.user
    turns += 'eq .Role "user" }}' + plain(before) + join + "{{ .Content }}" + plain(after)
    before, after = family.answer
    turns += '{{ else if eq .Role "assistant" }}' + plain(before) + "{{ .Content }}" + plain(after) + "{{ end }}"
    return text + "{{ " + loop + " }}" + turns + "{{ end }}" + plain(dialect.opening)


def _go_literal(text: str) -> str:
    """Text as it stands outside of Go's {{ }}; a brace of its own could open one."""
    return text.replace("{", '{{ "{" }}')


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OllamaModel:
    """The content of a Modelfile.

    name           of the model, as the two commands at the head of the file call it; any text
    weights        file name of the GGUF beside the Modelfile; with `adapter` the base, a GGUF or a name of Ollama's
    end_tokens     of the trained template (`ChatTemplate.end_tokens`)
    template       from `go_template`
    adapter        file name of an adapter GGUF beside the Modelfile
    system         from `shared_system`
    generation     the base's generation_config.json
    max_length     tokens of the longest row that training took
    max_positions  max_position_embeddings of the model
    license        of the base, by name
    """

    name: str
    weights: str
    end_tokens: Sequence[str]
    template: GoTemplate | None
    adapter: str | None = None
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    max_positions: int | None = None
    license: str | None = None


def modelfile(model: OllamaModel, file_name: str = "Modelfile") -> str:
    """The text of a Modelfile that will be called `file_name`."""
    name = model_name(model.name)
    weights = f"./{model.weights}" if model.weights.endswith(".gguf") else model.weights
    lines = [
        "# Run these two beside this file:",
        f"#   ollama create {name} -f {file_name}",
        f"#   ollama run {name}",
        "",
        f"FROM {_quoted_name(weights)}",
    ]
    if model.adapter is not None:
        lines.append("# The model above must be the one that this adapter was trained on.")
        lines.append(f"ADAPTER {_quoted_name(f'./{model.adapter}')}")
    lines += ["", *_template_lines(model.template), *_system_lines(model.system, model.template)]
    stops = [_quoted(token, '"') for token in dict.fromkeys(model.end_tokens) if token]
    lines += ["", *(f"PARAMETER stop {stop}" for stop in stops if stop is not None)]
    lines += _sampling_lines(model.generation) + _context_lines(model.max_length, model.max_positions)
    if model.license and (text := _quoted(model.license)) is not None:
        lines += ["", f"LICENSE {text}"]
    return "\n".join(lines) + "\n"


def model_name(text: str) -> str:
    """A name that `ollama create` takes (types/model/name.go): letters, digits, single dots, dashes, underscores."""
    plain = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", text.lower()))
    return plain[:MAX_NAME_CHARS].strip("-._") or "model"


def shared_system(prompts: Iterable[Sequence[Message]]) -> str | None:
    """The system prompt that all conversations begin with; None when one has another, several, or none."""
    shared: str | None = None
    for messages in prompts:
        systems = [message for message in messages if message.get("role") == "system"]
        if len(systems) != 1 or systems[0] is not messages[0]:
            return None
        content = systems[0].get("content")
        if not isinstance(content, str) or not content.strip() or shared not in (None, content):
            return None
        shared = content
    return shared


def _template_lines(template: GoTemplate | None) -> list[str]:
    text = _quoted(template.text) if template else None
    if template is None or text is None:
        return [
            "# No TEMPLATE: the trained chat template is of no family that is known here in Go's syntax. Ollama then",
            "# guesses one from the GGUF: compare `ollama show --template` with the chat template beside the weights.",
        ]
    lines = [f"# {template.label}, as trained. Tools are left out: Ollama's syntax for them is not the trained one."]
    if not template.takes_system:
        lines += ["# The trained template takes no system prompt: one that is given stands before the first question."]
    if template.drops_reasoning:
        lines += ["# The trained template drops the reasoning of earlier answers from the history; this one keeps it."]
    return [*lines, f"TEMPLATE {text}"]


def _system_lines(system: str | None, template: GoTemplate | None) -> list[str]:
    if system is None:
        return []
    text = _quoted(system.strip() if template and template.trims else system)
    if text is None:
        return [
            "# No SYSTEM, though all training rows share one: it has a line that ends with three quotes, or characters",
            "# that no Modelfile can hold. Send it with each request instead.",
        ]
    return ["# The system prompt that all training rows share.", f"SYSTEM {text}"]


# generation_config.json's key, Ollama's, whether it is a whole number, and the range in which transformers takes it
# (generation/logits_process.py), with ends far beyond what anybody uses.
_SAMPLING = (
    ("temperature", "temperature", False, (0.0, 100.0)),
    ("top_p", "top_p", False, (0.0, 1.0)),
    ("top_k", "top_k", True, (0, 1_000_000)),
    ("min_p", "min_p", False, (0.0, 1.0)),
    ("repetition_penalty", "repeat_penalty", False, (0.01, 100.0)),
)


def _sampling_lines(generation: Mapping[str, Any]) -> list[str]:
    """Sampling as the base's authors advise; a value out of its range (the file is a stranger's) is left out.

    Two defaults of Ollama's are no part of the model: where the config says that nothing is drawn, temperature is 0;
    and repeat_penalty is always written, since older versions punish repeated tokens by 1.1 by default
    (api/types.go), which spoils answers that repeat on purpose (JSON, names of the question).
    """
    values = {"repetition_penalty": 1.0, **{key: value for key, value in generation.items() if value is not None}}
    if values.get("do_sample") is False:
        values["temperature"] = 0.0
    lines = []
    for key, name, integer, (low, high) in _SAMPLING:
        if (value := values.get(key)) is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (integer and value != int(value)):  # nan is in no range
            lines.append(f"# generation_config.json: {key} = {repr(value)[:40]} cannot be used and is left out.")
        else:
            lines.append(f"PARAMETER {name} {int(value) if integer else f'{float(value):g}'}")
    return lines


def _context_lines(max_length: int | None, max_positions: int | None) -> list[str]:
    """As much as training took, at least what Ollama gives anyway, at most what the model has positions for.

    Without it Ollama cuts the beginning off longer conversations in silence; the whole of a base's 128 k positions
    would cost gigabytes of cache for lengths that were never trained.
    """
    wanted = max(max_length or 0, USUAL_CONTEXT_TOKENS)
    tokens = min(wanted, max_positions or wanted)
    return [f"PARAMETER num_ctx {tokens}"] if max_length or tokens < USUAL_CONTEXT_TOKENS else []


def _quoted(text: str, quote: Literal['"', '"""'] = '"""') -> str | None:
    """A value in quotes, or None where Ollama's parser (parser/parser.go) would read another one.

    It knows no escapes. A value ends at the first line that ends with its quotes, blanks after them not counted: quotes
    inside a line are safe, and so are line breaks. Characters that do not print are dropped, but for tabs.
    """
    if not all(char.isprintable() or char in "\n\r\t" for char in text):
        return None
    if quote == '"' and (f'"{text}"'.startswith('"""') or _ends_early(text, quote)):
        quote = '"""'
    return None if _ends_early(text, quote) else f"{quote}{text}{quote}"


def _ends_early(text: str, quote: str) -> bool:
    return any(line.rstrip().endswith(quote) for line in re.split(r"[\n\r]", text)[:-1])


def _quoted_name(name: str) -> str:
    """A file's or model's name: bare, as people write it, unless it has blanks or quotes."""
    quoted = _quoted(name, '"')
    if quoted is None or "\n" in name or "\r" in name:
        raise ValueError(f"{name!r} cannot stand in a Modelfile")
    return name if re.fullmatch(r"[\w./:@+-]+", name) else quoted
