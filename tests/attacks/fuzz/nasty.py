"""What a stranger writes in the place of a good value, a good file or a good name: pools, and changes at random."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

# Sequences that a terminal obeys: a title, a cleared screen, the clipboard, a colour, the one-byte form, a bell.
ESCAPES = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[H",
    "\x1b]52;c;b3duZWQ=\x07",
    "\x1b[38;5;199mpink",
    "\x9b31m",
    "\x07\x08\x08\x7f",
    "\x1bP+q544e\x1b\\",
    "\x1b]8;;http://evil\x07link\x1b]8;;\x07",
    "a\rb",
    "two\nlines",
    "\x0b\x0c\x1c\x85",
)
TEXTS = (
    *("", " ", "\0", "a\0b", "\ud800", "\u2028", "\u202eevil", "\ufeff", "é" * 300, "x" * 100_000),
    *(
        "~",
        "~nobody",
        "~no-such-user",
        "~no-such-user/x",
        "..",
        "../..",
        "../../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
    ),
    *("/dev/full", "/proc/self/mem", "/nowhere/at/all", "C:\\x", "\\\\host\\x", "a/../b", ".", "/", "//", "x" * 300),
    *("[bold red]x[/bold red]", "[/nope]", "[link=file:///etc/passwd]x[/link]", "[", "]", "\\[", "[red", ":smile:"),
    *("x: y #1", "---", "- a", "!!python/object:os.system", "<script>alert(1)</script>", "| a | b |", "`", "```"),
    *("{{ 7*7 }}", "{% for %}", "{0.__class__}", "%s%n", "${HOME}", "$(touch marker)", "; touch marker", "--set", "-"),
    *("NaN", "inf", "1e999", "0x10", "true", "null", "auto", "hub:owner/name", "owner/name", "F32", "BF16", "nf4"),
    *ESCAPES,
)
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 8, 64, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64),
    *(-(1 << 63), 10**6, 10**9, 10**12, 10**18, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), True, False, None),
)
# What json.dumps does not write: a key that stands twice, nesting, numbers that Python refuses to turn into text.
RAW = (
    "1" * 10_000,
    "-" + "9" * 10_000,
    "0." + "1" * 10_000,
    "1e" + "9" * 400,
    "[" * 100_000 + "]" * 100_000,
    "[" * 500 + "]" * 500,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    '{"a": 1, "a": 2}',
    "[" + "[]," * 200_000 + "[]]",
    "[" + "0," * 300_000 + "0]",
    "{" + ",".join(f'"k{i}":{i}' for i in range(50_000)) + "}",
    '["' + '","'.join(f"<x{i}>" for i in range(30_000)) + '"]',
    "",
    "nul",
    "'x'",
    "Infinity",
    '"\\ud800"',
    '"\\u0000"',
    '"tab\tin it"',
)
_MARK = "@@raw{}@@"


@dataclass(frozen=True)
class Raw:
    """A value as this text, whatever JSON thinks of it."""

    text: str


def value(chance: Random, drawn: list[Any], paths: tuple[str, ...] = ()) -> Any:
    """Something in the place of a good value; `paths` are those of this input's pipe, devices and bystanders."""
    kind = chance.random()
    if kind < 0.3:
        return chance.choice(NUMBERS)
    if kind < 0.55:
        return chance.choice(TEXTS)
    if kind < 0.65:
        return Raw(chance.choice(RAW))
    if kind < 0.72 and paths:
        return chance.choice(paths)
    if kind < 0.82 and drawn:
        return chance.choice(drawn)
    container = chance.randrange(6)
    if container == 0:
        return [value(chance, drawn, paths) for _ in range(chance.randrange(4))]
    if container == 1:
        return {chance.choice(TEXTS)[:200]: value(chance, drawn, paths) for _ in range(chance.randrange(3))}
    return ([], {}, [[]], [None], {"": None}, [1, "a"])[chance.randrange(6)]


def changed(good: Any, chance: Random, drawn: list[Any], paths: tuple[str, ...] = ()) -> Any:
    """A JSON value with one to three places of it replaced, taken out, doubled or added to."""
    result = json.loads(json.dumps(good))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        holder, key = _place(result, chance)
        if holder is None:
            return value(chance, drawn, paths)
        _change(holder, key, chance, drawn, paths)
    return result


def _place(tree: Any, chance: Random) -> tuple[Any, Any]:
    """A container in a JSON value and one of its keys; shallow ones more often. (None, None) where there is none."""
    holder, key = None, None
    current = tree
    while isinstance(current, dict | list) and current:
        holder = current
        key = chance.choice(list(current)) if isinstance(current, dict) else chance.randrange(len(current))
        current = holder[key]
        if chance.random() < 0.4:
            break
    return holder, key


def _change(holder: Any, key: Any, chance: Random, drawn: list[Any], paths: tuple[str, ...]) -> None:
    old, action = holder[key], chance.randrange(10)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[chance.choice(TEXTS)[:2000]] = value(chance, drawn, paths)
    elif action == 2 and isinstance(holder, list):
        holder += [old] * chance.choice((1, 100, 20_000))
    elif action == 3:
        holder[key] = [old]
    elif action == 4:
        holder[key] = str(old)
    elif action == 5 and isinstance(old, int | float):
        half = old + 0.5 if abs(old) < 1 << 1000 else 0.5  # beyond, no number with a fraction is as large
        holder[key] = chance.choice((-old, old * 2, old << 40 if isinstance(old, int) else old * 1e30, half))
    elif action == 6 and isinstance(old, str):
        holder[key] = chance.choice((old + chance.choice(TEXTS), chance.choice(ESCAPES) + old, old[: len(old) // 2]))
    else:
        holder[key] = value(chance, drawn, paths)


def dumped(tree: Any) -> bytes:
    """JSON of a value in which `Raw` stands."""
    raws: list[str] = []

    def placed(item: Any) -> str:
        raws.append(item.text)
        return _MARK.format(len(raws) - 1)

    text = json.dumps(tree, default=placed)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{_MARK.format(number)}"', raw)
    return text.encode("utf-8", "surrogatepass")


def scratched(data: bytes, chance: Random) -> bytes:
    """The bytes with a few of them changed, cut or doubled."""
    raw = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(raw) + 1)
        action = chance.randrange(5)
        if action == 0:
            raw[place:place] = bytes([chance.randrange(256)])
        elif action == 1:
            del raw[place : place + chance.randrange(8)]
        elif action == 2 and place < len(raw):
            raw[place] ^= 1 << chance.randrange(8)
        elif action == 3:
            raw[place:place] = raw[max(0, place - 5) : place]
        elif chance.random() < 0.2:
            del raw[place:]
    return bytes(raw)


def json_file(file: Path, chance: Random, drawn: list[Any], paths: tuple[str, ...] = ()) -> None:
    """Change a good JSON file: mostly one of its values, else its bytes."""
    good = file.read_bytes()
    if chance.random() < 0.8:
        data = dumped(changed(json.loads(good), chance, drawn, paths))
    elif chance.random() < 0.6:
        data = scratched(good, chance)
    else:
        data = chance.choice(
            (b"", b"\xff\xfe{}", b"\xef\xbb\xbf" + good, b"{}", b"[]", b"null", good * 2, b"\x80\x04.")
        )
    replace(file, data)


def replace(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else dumped(header)
    return struct.pack("<Q", (len(text) if length is None else length) & ((1 << 64) - 1)) + text + data


def safetensors_file(file: Path, chance: Random, drawn: list[Any]) -> None:
    """Change a good safetensors file: its header, the length of it, or bytes."""
    good = file.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    kind = chance.random()
    if kind < 0.7:
        replace(file, safetensors(changed(header, chance, drawn), data))
    elif kind < 0.8:
        replace(file, safetensors(header, data, chance.choice((0, 1, size - 1, size + 1, 1 << 40, (1 << 64) - 1, -1))))
    elif kind < 0.9:
        replace(file, safetensors(header, chance.choice((b"", data[:-1], data + b"x", data[: len(data) // 2]))))
    else:
        replace(file, scratched(good[: 8 + size], chance) + data)


ENTRIES = (
    "pipe",
    "device",
    "loop",
    "bystander",
    "folder",
    "dangling",
    "empty",
    "gone",
    "socket",
    "null",
    "hard",
    "huge",
)


def entry(file: Path, kind: str, bystander: Path, huge_bytes: int = 1 << 36) -> None:
    """Put what is no plain file of that name in its place."""
    file = Path(os.path.normpath(file))
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        (file / "in").mkdir(parents=True)
    elif kind == "empty":
        file.touch()
    elif kind == "socket" and len(file.name) < 80:  # a socket's own path may have 107 bytes
        place = os.open(file.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{place}/{file.name}")
        os.close(place)
    elif kind == "hard":
        os.link(bystander, file)
    elif kind == "huge":
        with file.open("wb") as stream:
            stream.truncate(huge_bytes)
    elif kind != "gone":
        targets = {"device": "/dev/zero", "loop": file.name, "bystander": str(bystander), "null": "/dev/null"}
        file.symlink_to(targets.get(kind, "/nowhere/at/all"))
