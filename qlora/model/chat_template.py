"""Which chat template a run works with: the base's own, ChatML, or a file of the user's; and its keyword arguments.

The choice is made once, on the tokenizer's files: from then on the run's copy, the adapter's folder and every export
have the chosen template where transformers, PEFT, llama.cpp and Ollama look for one, and rows, samples, evaluation and
checks are rendered by it. A file of the user's is so kept in the run, which goes on with it whatever becomes of it.

`template_kwargs` are written at the head of the template (`{%- set enable_thinking = false %}`): no server passes them
by itself, and what is served must be what was trained. A server's own value of that name has no effect any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import chatml, files
from qlora.errors import Problem, RecipeError, TokenizerError
from qlora.events import Notice, Sink
from qlora.model.tokenizer import open_tokenizer
from qlora.model.tokenizer_check import MAX_TEMPLATE
from qlora.model.tokenizer_files import NAMED_TEMPLATES, TEMPLATE, TOKENIZER_CONFIG, TokenizerFiles

if TYPE_CHECKING:
    from qlora.recipe.sections import ModelSection

OF_PROCESSOR = "chat_template.json"  # which transformers reads for a processor only, not for a tokenizer
# What a template is given anyway, and words of Jinja's own.
_TAKEN = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("and", "or", "not", "in", "is", "if", "else", "true", "false", "none", "True", "False", "None"),
    )
)


def chosen(found: TokenizerFiles, section: ModelSection, name: str, sink: Sink) -> TokenizerFiles:
    """The tokenizer files of the base `name` with the chat template that [model] asks for.

    Raises TokenizerError for a file that is no template and a base that ChatML cannot be used on, RecipeError for
    keyword arguments that the template does not read.
    """
    if section.chat_template == "chatml":
        found = with_chatml(found, name, sink)
    elif section.chat_template != "auto":
        found = with_template(found, read_template(section.chat_template))
        message = f"{section.chat_template} is the chat template of this run, in the place of the base's; it is kept"
        sink.emit(Notice("template", f"{message} in the run's folder and goes with adapter and exports"))
    elif not templates_of(found) and (text := _of_processor(found)):
        found = with_template(found, text)
    return _with_kwargs(found, section.template_kwargs, sink) if section.template_kwargs else found


def as_before(found: TokenizerFiles, name: str, adapter: Path, sink: Sink) -> TokenizerFiles:
    """The files that a run kept, as it used them: older versions took ChatML where the base has no chat template.

    Then they delivered it in the folder `adapter`; a run without one beside its adapter has none.
    """
    without = adapter.is_dir() and not any((adapter / file).is_file() for file in (TEMPLATE, OF_PROCESSOR))
    return found if without or templates_of(found) else with_chatml(found, name, sink)


def read_template(path: str) -> str:
    """The text of a file with a chat template. Raises TokenizerError."""
    try:
        text = files.read_bytes(files.user_path(path, "model.chat_template"), 4 * MAX_TEMPLATE).decode("utf-8-sig")
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except OSError as error:
        reason = error.strerror or str(error)
    except files.UnsafePathError as error:
        reason = str(error)
    else:
        if text.strip() and len(text) <= MAX_TEMPLATE and "\0" not in text:
            return text
        reason = f"more than {MAX_TEMPLATE:,} characters" if text.strip() else "it is empty"
        reason = "it holds a NUL character" if "\0" in text else reason
    hint = 'chat_template under [model] is "auto", "chatml" or a file with a Jinja template'
    raise TokenizerError(f"model.chat_template: {path}: no chat template ({reason})", hint)


def with_chatml(found: TokenizerFiles, name: str, sink: Sink) -> TokenizerFiles:
    """The files with ChatML as their template.

    Its turns end with `<|im_end|>` where the base knows it as one token and has an embedding for it, else with the
    end of text: only a token that generation stops at can be learned as an end. Raises TokenizerError without either.
    """
    with found.placed() as folder:
        tokenizer = open_tokenizer(folder, name)
    vocab, rows = tokenizer.get_vocab(), found.embedding_rows or 1 << 31
    ends = [chatml.END] if vocab.get(chatml.END, rows) < rows else []
    if not (ends := ends or ([str(tokenizer.eos_token)] if tokenizer.eos_token is not None else [])):
        what = f"{name}: the tokenizer has no token that ends an answer: the model could never stop"
        raise TokenizerError(what, "set eos_token in the base's tokenizer_config.json, or use another base")
    message = f"ChatML is the chat template, its turns end with {ends[0]}"
    if chatml.START not in vocab:
        cost = len(tokenizer.encode(chatml.START, add_special_tokens=False))
        message += f"; {chatml.START} is no token of this base: it takes {cost} tokens a turn"
    sink.emit(Notice("template", message))
    return with_template(found, chatml.template(ends[0]))


def with_template(found: TokenizerFiles, text: str) -> TokenizerFiles:
    """The files with `text` as their only template: in the two places where old and new libraries look for it."""
    content = {name: data for name, data in found.content.items() if not name.startswith(f"{NAMED_TEMPLATES}/")}
    content.pop(OF_PROCESSOR, None)
    content[TEMPLATE] = text.encode()
    config = found.json_object(TOKENIZER_CONFIG)
    if "chat_template" in config:
        content[TOKENIZER_CONFIG] = _json({**config, "chat_template": text})
    return TokenizerFiles(content)


def templates_of(found: TokenizerFiles) -> list[str]:
    """The templates that transformers reads for a tokenizer (PreTrainedTokenizerBase.from_pretrained)."""
    named = sorted(name for name in found.content if name.startswith(f"{NAMED_TEMPLATES}/"))
    if TEMPLATE in found.content or named:
        return [found.content[name].decode("utf-8", "replace") for name in (TEMPLATE, *named) if name in found.content]
    stored = found.json_object(TOKENIZER_CONFIG).get("chat_template")
    if isinstance(stored, list):
        return [str(entry.get("template")) for entry in stored if isinstance(entry, dict)]
    if isinstance(stored, dict):
        return [str(text) for text in stored.values()]
    return [stored] if isinstance(stored, str) and stored else []


def _with_kwargs(found: TokenizerFiles, kwargs: Mapping[str, Any], sink: Sink) -> TokenizerFiles:
    texts = templates_of(found)
    for key in kwargs:
        where = f"model.template_kwargs: {key}"
        if key in _TAKEN:
            raise RecipeError([Problem("recipe", f"{where}: a template is given it anyway", "take it out")])
        if texts and not any(re.search(rf"\b{re.escape(key)}\b", text) for text in texts):
            hint = "correct its name as it stands in the template, or take it out"
            raise RecipeError([Problem("recipe", f"{where}: the chat template does not read it", hint)])
    if not texts:
        hint = 'add chat_template = "chatml" or a file under [model], or take them out'
        raise RecipeError([Problem("recipe", "model.template_kwargs: the base has no chat template", hint)])
    head = "".join(f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} %}}" for key, value in kwargs.items())
    shown = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in kwargs.items())
    message = f"{shown}: written at the head of the chat template, in the adapter's folder and every export too"
    sink.emit(Notice("template", f"{message}, so that serving needs no arguments", len(kwargs)))
    return _changed(found, lambda text: head + ("{{- '' }}" if text[:1] in "\r\n" else "") + text)


def _changed(found: TokenizerFiles, change: Callable[[str], str]) -> TokenizerFiles:
    """The files with each of their templates changed, where it stands."""
    content = dict(found.content)
    for name, data in found.content.items():
        if name == TEMPLATE or name.startswith(f"{NAMED_TEMPLATES}/"):
            content[name] = change(data.decode("utf-8", "replace")).encode()
    config = found.json_object(TOKENIZER_CONFIG)
    stored = config.get("chat_template")
    new: Any = None
    if isinstance(stored, str) and stored:
        new = change(stored)
    elif isinstance(stored, dict):
        new = {name: change(str(text)) for name, text in stored.items()}
    elif isinstance(stored, list):
        entries = [entry for entry in stored if isinstance(entry, dict)]
        new = [{**entry, "template": change(str(entry.get("template")))} for entry in entries]
    if new:
        content[TOKENIZER_CONFIG] = _json({**config, "chat_template": new})
    return TokenizerFiles(content)


def _of_processor(found: TokenizerFiles) -> str:
    text = found.json_object(OF_PROCESSOR).get("chat_template")
    return text if isinstance(text, str) else ""


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
