"""Anything at all in a recipe, a shard index, a safetensors header or a data row: an error in two lines, or it is fine.

A few hundred inputs each here, 10,000 each where slow tests run.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora.data.prepare import check_files
from qlora.data.row_json import RowError
from qlora.data.sources import read_rows
from qlora.errors import RecipeError, UserError
from qlora.model.base_folder import check_config
from qlora.model.tensors import find_tensors, read_header
from qlora.recipe.reading import key_names, load_recipe
from qlora.recipe.sections import DataSection, SourceSection
from tests.data.cases import BROKEN_LINES, GOOD

FAST, SLOW = 300, 10_000
DRAWN = 0.3  # the share that hypothesis draws whole, at 5 to 10 ms each; changed bytes of good inputs cost a tenth
Check = Callable[[Path, bytes], None]

numbers = st.one_of(st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1 << 63, 64, 8]))
texts = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "../x", "/etc/passwd", "\0", "F32", "BF16", "a.safetensors"])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def scratched(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few of them changed, cut or doubled."""
    raw = bytearray(data)
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(raw) + 1)
        action = chance.randrange(4)
        if action == 0:
            raw[place:place] = bytes([chance.randrange(256)])
        elif action == 1:
            del raw[place : place + chance.randrange(8)]
        elif action == 2 and place < len(raw):
            raw[place] ^= 1 << chance.randrange(8)
        else:
            raw[place:place] = raw[max(0, place - 5) : place]
    return bytes(raw)


# --- recipe ----------------------------------------------------------------------------------------------------------

KEYS = [*key_names(), "model.bse", "lora.rank", "x.y", "train.epochs"]
toml_values = st.one_of(
    st.booleans().map(lambda b: str(b).lower()),
    st.integers(-(2**65), 2**65).map(str),
    st.floats().map(str),
    texts.map(lambda text: json.dumps(text, ensure_ascii=True)),
    st.sampled_from(
        ["[]", "{}", '["a"]', "[1, [2]]", "'; touch x'", "1979-05-27", "'''\n'''", "nan", "0x", '"nf4"', "auto"]
    ),
)
recipes = st.lists(st.tuples(st.sampled_from(KEYS), toml_values), max_size=6).map(
    lambda pairs: "".join(f"{key} = {value}\n" for key, value in pairs).encode("utf-8", "surrogatepass")
)
MINIMAL = b'[model]\nbase = "/nowhere"\n[[data.train]]\npath = "rows.jsonl"\n[lora]\nr = 8\n[train]\nepochs = 1\n'


def check_recipe(folder: Path, data: bytes) -> None:
    file = folder / "recipe.toml"
    file.write_bytes(data)
    try:
        load_recipe(file)
    except RecipeError as error:
        assert error.problems and all(problem.what and problem.hint for problem in error.problems)


# --- a shard index ---------------------------------------------------------------------------------------------------

indexes = st.one_of(
    values,
    st.dictionaries(texts, values, max_size=3),
    st.fixed_dictionaries({"weight_map": st.one_of(values, st.dictionaries(texts, texts, max_size=4))}),
).map(dumped)
GOOD_INDEX = dumped({"metadata": {"total_size": 64}, "weight_map": {"a": "model-1.safetensors"}})


def check_index(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(data)
    shard = folder / "model-1.safetensors"
    if not shard.exists():
        shard.write_bytes(safetensors({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}))
    expect_two_lines(lambda: find_tensors(folder))


# --- a safetensors header --------------------------------------------------------------------------------------------

entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(texts, st.sampled_from(["F32", "BF16", "I8", "F4"])),
            "shape": st.one_of(values, st.lists(st.integers(-1, 70), max_size=3)),
            "data_offsets": st.one_of(values, st.lists(st.integers(-1, 200), min_size=2, max_size=2)),
        }
    ),
)
headers = st.one_of(st.dictionaries(texts, entries, max_size=4), values).map(lambda value: safetensors(value))
GOOD_FILE_ENTRIES = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4, 6], "data_offsets": [16, 64]},
}


def safetensors(header: Any, data_bytes: int = 64) -> bytes:
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def check_header(folder: Path, data: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(data)

    def read() -> None:
        size = file.stat().st_size
        for entry in read_header(file).values():
            assert 0 <= entry.offset <= entry.offset + entry.nbytes <= size

    expect_two_lines(read)


# --- data rows -------------------------------------------------------------------------------------------------------

roles = st.one_of(texts, st.sampled_from(["user", "assistant", "system", "tool"]))
messages = st.lists(
    st.one_of(values, st.fixed_dictionaries({"role": roles, "content": values, "tool_calls": values})), max_size=4
)
rows = st.one_of(
    values,
    st.fixed_dictionaries({"messages": messages}),
    st.fixed_dictionaries({"prompt": values, "completion": values}),
    st.fixed_dictionaries({"instruction": values, "output": values, "history": values}),
    st.fixed_dictionaries(
        {"conversations": st.lists(st.fixed_dictionaries({"from": roles, "value": values}), max_size=3)}
    ),
    st.fixed_dictionaries({"text": values, "tools": values}),
).map(dumped)
KNOWN_ROWS = [
    dumped(GOOD),
    *(
        line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
        for _, line, _ in BROKEN_LINES
        if len(line) < 1000
    ),
]


def check_rows(folder: Path, data: bytes) -> None:
    # The kinds of file in turn: which one is a function of the input, so that a failure repeats.
    file = folder / ("rows.jsonl", "rows.json", "rows.csv", "rows.jsonl")[len(data) % 4]
    file.write_bytes(data)
    source = SourceSection(path=str(file))
    expect_two_lines(lambda: check_files(DataSection(train=(source,))))
    expect_two_lines(lambda: list(read_rows(source)))


def expect_two_lines(work: Callable[[], Any]) -> None:
    try:
        work()
    except RowError as error:
        raise AssertionError("a row's error without its place") from error
    except UserError as error:
        assert error.what and error.hint and "\n" not in error.what + error.hint, (error.what, error.hint)
        assert len(error.what) < 2000


# --- the runs --------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Any, Check, list[bytes]]] = {
    "recipe": (recipes, check_recipe, [MINIMAL]),
    "shard index": (indexes, check_index, [GOOD_INDEX]),
    "safetensors header": (headers, check_header, [safetensors(GOOD_FILE_ENTRIES)]),
    "data rows": (rows, check_rows, KNOWN_ROWS),
}


def fuzz(name: str, count: int) -> int:
    """Some inputs are drawn whole by hypothesis, the others are good ones with a few bytes changed.

    `check` fails for a traceback. Returns how many inputs it has seen to its end.
    """
    strategy, check, seeds = TARGETS[name]
    seen = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        @settings(
            max_examples=int(count * DRAWN),
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[*HealthCheck],
        )
        @given(strategy)
        def drawn(data: bytes) -> None:
            nonlocal seen
            check(folder, data)
            seen += 1

        drawn()
        chance = random.Random(name)
        for _ in range(count - int(count * DRAWN)):
            check(folder, scratched(chance.choice(seeds), chance))
            seen += 1
    return seen


@pytest.mark.parametrize("name", TARGETS)
def test_some(name: str) -> None:
    assert fuzz(name, FAST) >= FAST


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand(name: str) -> None:
    assert fuzz(name, SLOW) >= SLOW


def test_configurations(llama: Path) -> None:
    """A good config.json with values of any kind: refused, or checked and known to be harmless."""
    good = json.loads((llama / "config.json").read_text())

    @settings(max_examples=FAST, deadline=None, database=None, derandomize=True)
    @given(st.dictionaries(st.one_of(st.sampled_from(sorted(good)), texts), values, max_size=3))
    def drawn(changes: dict[str, Any]) -> None:
        expect_two_lines(lambda: check_config(good | changes, "base"))

    drawn()
