"""Rows from a stranger: lines, arrays, tables, columns of Parquet, texts; folders and patterns that name them."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.recipe_door import toml
from tests.attacks.fuzz.seen import Work
from tests.data.cases import BROKEN_LINES, GOOD

KNOWN: list[Any] = [
    GOOD,
    {"messages": [{"role": "system", "content": "s"}, *GOOD["messages"]], "tools": [{"type": "function"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"text": "a plain text"},
    {
        "messages": [
            {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        ]
    },
]
NAMES = ("rows", "ro\x1b[2Jws", "rows [1]", "*", "[a-z]", "**", "~nobody", "-rows", "ro\nws", "%s", "x" * 200)
PATTERNS = (
    "*.jsonl",
    "**/*.jsonl",
    "**",
    "[",
    "***",
    "{a,b}",
    "a/../**",
    "?" * 300,
    "**/" * 60 + "*.jsonl",
    "[!a]*",
    ".",
)


def parquet_columns() -> dict[str, Callable[[Random], Any]]:
    """Arrays of many types, three values each."""
    import pyarrow as pa

    day, moment = datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5)
    number = decimal.Decimal("1.50")
    return {
        "string": lambda c: pa.array(["a", c.choice(("", "\0", "\u2028", "\x1b[2J", "b")), None][: c.choice((1, 3))]),
        "dates": lambda c: pa.array([day, None, day], c.choice((pa.date32(), pa.date64()))),
        "moments": lambda c: pa.array([moment] * 3, pa.timestamp(c.choice(("s", "ns")), tz=c.choice((None, "UTC")))),
        "far": lambda c: pa.array([2**62, -(2**62), 0], pa.timestamp(c.choice(("s", "us")))),
        "span": lambda c: pa.array([1, 2**62, None], pa.duration("s")),
        "time": lambda c: pa.array([1, 2, 3], pa.time64("ns")),
        "decimal": lambda c: pa.array([number] * 3, c.choice((pa.decimal128(38, 10), pa.decimal256(76, 30)))),
        "bytes": lambda c: pa.array([b"\xff\x00", b"", None], c.choice((pa.binary(), pa.large_binary()))),
        "fixed": lambda c: pa.array([b"abcd"] * 3, pa.binary(4)),
        "numbers": lambda c: pa.array([1, 2, None], c.choice((pa.int8(), pa.uint64(), pa.float16(), pa.float64()))),
        "nan": lambda c: pa.array([float("nan"), float("inf"), 0.0]),
        "dictionary": lambda c: pa.array(["a", "b", "a"]).dictionary_encode(),
        "big": lambda c: pa.array(["x" * 40_000_000, "", ""]) if c.random() < 0.1 else pa.array(["x"] * 3),
        "many": lambda c: pa.array([["y" * 1000] * 60_000] * 3) if c.random() < 0.1 else pa.array([[1], [], None]),
        "copies": lambda c: pa.DictionaryArray.from_arrays(pa.array([0] * 300_000, pa.int32()), ["z" * 4000]),
        "struct": lambda c: pa.array([{"role": "user", "content": "x"}] * 3),
        "list": lambda c: pa.array([[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 3),
        "map": lambda c: pa.array([[("a", 1)], [("a", 1), ("a", 2)], None], pa.map_(pa.string(), pa.int64())),
        "null": lambda c: pa.nulls(3),
        "bool": lambda c: pa.array([True, False, None]),
        "view": lambda c: pa.array(["a", "b", None], pa.string_view()),
    }


def parquet(file: Path, chance: Random) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = parquet_columns()
    names = ["text", "messages", "prompt", "completion", "a", "a", "\x1b[2J", "", "conversations"]
    made = [columns[chance.choice(sorted(columns))](chance) for _ in range(chance.randrange(1, 4))]
    length = max(map(len, made))
    made = [array if len(array) == length else pyarrow.nulls(length) for array in made]
    chosen = [chance.choice(names) for _ in made]
    table = pyarrow.Table.from_arrays(made, names=chosen)
    with file.open("wb") as stream:
        try:
            pyarrow.parquet.write_table(table, stream, compression=chance.choice(("snappy", "zstd", "none")))
        except (pyarrow.ArrowException, ValueError, UnicodeError):
            stream.write(b"PAR1")  # this version writes no such type
    if chance.random() < 0.4:
        nasty.replace(file, nasty.scratched(file.read_bytes(), chance))


def content(ending: str, chance: Random, scene: Scene) -> bytes:
    good, drawn = chance.choice(KNOWN), scene.goods.drawn
    if chance.random() < 0.3:
        _, line, _ = chance.choice(BROKEN_LINES)
        bad = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    else:
        bad = nasty.dumped(nasty.changed(good, chance, drawn, scene.paths))
    if ending == "json":
        data = b"[" + nasty.dumped(good) + b",\n" + bad + b"]"
    elif ending in ("csv", "tsv"):
        fields = [str(nasty.value(chance, []))[:50_000] for _ in range(4)]
        data = ",".join(("text", "b", *fields)).encode("utf-8", "surrogatepass") + b"\n" + bad[:100_000] + b",x\n"
    else:
        data = nasty.dumped(good) + b"\n" + bad + b"\n" + nasty.dumped(good) + b"\n"
    return nasty.scratched(data, chance) if chance.random() < 0.25 else data


def make(scene: Scene) -> Work:
    chance, kind = scene.chance, scene.chance.random()
    folder = scene.place / "data"
    folder.mkdir()
    ending = chance.choice(("jsonl", "jsonl", "jsonl", "json", "json", "csv", "tsv", "txt", "md"))
    ending = "parquet" if chance.random() < 0.07 else ending  # each is decoded by a process of its own
    name = "rows" if chance.random() < 0.8 else chance.choice(NAMES)
    file = folder / f"{name}.{ending}"
    if ending == "parquet":
        parquet(file, chance)
    else:
        file.write_bytes(content(ending, chance, scene))
    path = str(file)
    if kind < 0.1:
        # Rows may be of any length; these are one line, a little longer than any may be.
        nasty.entry(file, chance.choice(nasty.ENTRIES), scene.bystander, huge_bytes=300 << 20)
    elif kind < 0.2:
        inside(folder, scene)
        path = chance.choice((str(folder), str(folder / chance.choice(PATTERNS))))
    elif kind < 0.25:
        path = chance.choice((*nasty.TEXTS, *scene.paths)) or "x"
        path = path.replace("\ud800", "x")  # no TOML gives half a surrogate pair
    keys: dict[str, Any] = {"path": path}
    if chance.random() < 0.15:
        keys["columns"] = {chance.choice(("text", "prompt", "\x1b[2J")): chance.choice(("text", "b", "[/x]", "none"))}
    if chance.random() < 0.3:
        keys["format"] = chance.choice(("messages", "prompt-completion", "alpaca", "sharegpt", "text"))
    tokens, bad = chance.random() < 0.03, chance.choice((0, 0, 1, 100))
    return lambda: use(scene, keys, tokens, bad)


def inside(folder: Path, scene: Scene) -> None:
    """What may lie in a folder of rows: links out of it, to itself, to pipes; odd names; depth."""
    chance = scene.chance
    for number in range(3):
        nasty.entry(folder / f"{number}.jsonl", chance.choice([*nasty.ENTRIES[:10], "gone"]), scene.bystander)
    if chance.random() < 0.5:
        (folder / "a").symlink_to(chance.choice((".", "..", "/", str(scene.bystander.parent), "/proc/self/fd")))
    if chance.random() < 0.5:
        deep = folder.joinpath(*["d"] * 60)
        deep.mkdir(parents=True)
        (deep / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")


def use(scene: Scene, keys: dict[str, Any], tokens: bool, bad: int) -> None:
    """What a check does with rows: first rows, all rows, and for some their tokens."""
    import os

    from qlora import disk
    from qlora.data.prepare import check_files, prepare
    from qlora.data.sources import read_rows
    from qlora.recipe.reading import load_recipe

    overrides = (f"data.train={toml([keys])}", f"data.max_bad_rows={bad}", "data.max_length=96")
    data = load_recipe(scene.goods.recipe, overrides).data
    sink = goods.sink()
    check_files(data)
    for row in read_rows(data.train[0]):
        assert row.where and row.row is not None
    if tokens:
        chat = goods.chat_of(scene.goods.base, os.getpid())
        prepare(data, "tokenizer", chat, 1, disk.cache_dir(), sink)
    sink.close()


DOOR = Door("rows", make)
