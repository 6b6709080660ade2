"""Tokenizers from strangers: tables, patterns, templates, panics. Each is opened, or refused in two lines that name the
file, the key and the value; nothing of it runs, and nothing is printed past us."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import QloraError, TokenizerError
from qlora.export.gguf.vocab import read_vocab
from qlora.model.tokenizer import open_tokenizer
from tests.attacks import payloads as p
from tests.tokenizers import added, byte_level, gemma, llama2

JSON, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, VOCAB, MODEL = "added_tokens.json", "vocab.json", "tokenizer.model"
TOKEN = {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
MANY = [f"<x{i}>" for i in range(300_000)]

# tokenizer_config.json: values that stand where another belongs.
WRONG: dict[str, list[Any]] = {
    "tokenizer_class": [5, [], {}, "../evil", "os.system('x')", "A" * 300, True],
    "model_max_length": ["x", 0, -5, [], True, {}],
    "padding_side": [5, "up", []],
    "truncation_side": [7, "both", {}],
    "bos_token": [5, [1], {"content": 5}, {"content": None}, {}, True, "x" * 20_000,
                  {"content": "a", "special": "yes"}],
    "eos_token": [5, [1], {"content": 5}, "\ud800", {"content": "\udfff"}],
    "pad_token": [5, ["a"], False],
    "unk_token": [1.5],
    "additional_special_tokens": [5, "x", [5], [[1]], [{"content": 5}], [{}], MANY, {"a": 5}],
    "extra_special_tokens": [5, "x", [5], [{"a": "b"}], MANY, {"a": [1]}],
    "model_specific_special_tokens": [5, {"a": 5}],
    "added_tokens_decoder": [5, [], {"x": TOKEN}, {"-1": TOKEN}, {"1" * 5000: TOKEN}, {"99999999999": TOKEN},
                             {"5": "x"}, {"5": 5}, {"5": {"content": 5}}, {"5": {**TOKEN, "special": "x"}},
                             {"٣": TOKEN}, {str(i): TOKEN for i in range(100_001)}],
    "chat_template": ["\ud800", 5, [5], [{}], [{"name": "a"}], [{"name": 5, "template": "x"}], "x" * 1_000_001,
                      {"default": 5}, [{"name": str(i), "template": "x"} for i in range(65)], ["x"]],
    "init_inputs": [["/etc/passwd"], "x", 5, {"a": 1}],
    "model_input_names": [5, [5], ["x"] * 101],
    "add_prefix_space": ["yes", 1, []],
    "add_bos_token": ["yes"],
    "split_special_tokens": [3],
    "clean_up_tokenization_spaces": ["no"],
    "legacy": ["no"],
    "errors": [5, {}],
}  # fmt: skip
WRONG_MAP: dict[str, list[Any]] = {
    "bos_token": [5, [1], {"content": 5}],
    "additional_special_tokens": [5, [5], MANY],
    "tokenizer_file": ["/etc/passwd", None],
    "vocab_file": ["/etc/passwd"],
    "tokenizer_object": [{"a": 1}],
    "init_kwargs": [{}],
}
WRONG_ADDED: list[Any] = [[], 5, "x", {"<x>": "5"}, {"<x>": -1}, {"<x>": 1 << 40}, {"<x>": None}, {"<x>": 1.5},
                          {text: 5000 + i for i, text in enumerate(MANY)}, {"x" * 20_000: 5}]  # fmt: skip
RAW: dict[str, str | bytes] = {
    "nothing": "",
    "half": '{"model": {"type": "BPE", "vocab": {"a',
    "a list": "[1]",
    "null": "null",
    "bytes": b"\xff\xfe\x00\x01",
    "depth": "[" * 100_000,
    "depth of objects": '{"a":' * 300 + "1" + "}" * 300,
    "a doubled key": '{"model": 1, "model": 2}',
    "10,000 digits": '{"model_max_length": ' + "9" * 10_000 + "}",
    "1e999": '{"model_max_length": 1e999}',
}
Content = dict[str, Any]
ZEROS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# tokenizer.json: what is put in the place of a part, and what the first line says.
PARTS: dict[str, tuple[Content, str]] = {
    "no model": ({"model": None}, "model is wrong"),
    "a model that is a list": ({"model": []}, "model is wrong"),
    "added tokens that are a table": ({"added_tokens": {}}, "added_tokens is wrong"),
    "an added token without id": ({"added_tokens": [TOKEN]}, "added_tokens.0.id is wrong"),
    "an added token of another type": ({"added_tokens": [5]}, "added_tokens.0 is wrong"),
    "an added token with a negative id": ({"added_tokens": [{**added("<x>", -1)}]}, "added_tokens.0.id.*-1"),
    "an added token with a huge id": ({"added_tokens": [{**added("<x>", 1 << 40)}]}, "added_tokens.0.id"),
    "an added token of a megabyte": ({"added_tokens": [{**added("x" * 1_000_000, 5)}]}, "added_tokens.0.content"),
    "half of a character": ({"added_tokens": [{**added("\ud800", 5)}]}, "added_tokens.0.content"),
    "300,000 added tokens": (
        {"added_tokens": [{"id": 3000 + i, "content": text} for i, text in enumerate(MANY)]},
        "added_tokens is wrong: List should have at most 100000 items",
    ),
    "a pattern that never ends": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, r"'\(a\+\)\+\$'"),
    "the same in a sequence": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": {"Regex": r"(\w*\s?)*x"}}]}},
        "pre_tokenizer is wrong: the pattern",
    ),
    "the same in a normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"([\s]*,?[\s]*)*!"}, "content": ""}},
        "normalizer is wrong: the pattern",
    ),
    "the same in a decoder": (
        {"decoder": {"type": "Replace", "pattern": {"Regex": r"((a)*)*"}, "content": ""}}, "decoder is wrong",
    ),
    "a pattern that is none": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a"}}}, "cannot be opened"),
    "a pattern of a megabyte": (
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a" * 1_000_000}}}, "Regex has 1,000,000 characters",
    ),
    "a hundred thousand steps": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 100_000}},
        "pre_tokenizer is wrong: is made of more",
    ),
    "a text that doubles forty times": (
        {"normalizer": {"type": "Sequence", "normalizers": [ZEROS] * 40}}, "normalizer is wrong: makes 1,099,5",
    ),
    "a character that becomes a page": (
        {"normalizer": {**ZEROS, "content": "x" * 10_000}}, "normalizer is wrong: makes 10,000 characters of one",
    ),
    "an empty pattern that becomes much": (
        {"normalizer": {**ZEROS, "pattern": {"Regex": ""}, "content": "x" * 5_000}}, "makes 5,000 characters",
    ),
    "a step that is a list": ({"normalizer": []}, "normalizer is wrong"),
    "a step that is a text": ({"pre_tokenizer": "ByteLevel"}, "pre_tokenizer is wrong"),
    "an unknown step": ({"pre_tokenizer": {"type": "Evil"}}, "cannot be opened"),
    "a step without its keys": ({"pre_tokenizer": {"type": "Split"}}, "cannot be opened"),
    "a broken map of characters": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be opened",
    ),
    "a stride beyond the length": (
        {"truncation": {"max_length": 5, "stride": 10, "strategy": "LongestFirst", "direction": "Right"}},
        "cannot be opened",
    ),
}  # fmt: skip
MODELS: dict[str, tuple[Content, str]] = {
    "no vocabulary": ({"vocab": None}, "model.vocab is wrong"),
    "a vocabulary that is a text": ({"vocab": "x"}, "model.vocab is wrong"),
    "a negative id": ({"vocab": {"a": -1}}, "model.vocab is wrong"),
    "a huge id": ({"vocab": {"a": 4 * 10**9}}, "model.vocab is wrong"),
    "an id that is a text": ({"vocab": {"a": "1"}}, "model.vocab is wrong"),
    "an id that is true": ({"vocab": {"a": True}}, "model.vocab is wrong"),
    "a million tokens": ({"vocab": {str(i): i for i in range((1 << 20) + 1)}}, "has 1,048,577 tokens"),
    "a token of a megabyte": ({"vocab": {"x" * 1_000_000: 0}}, "has a token of 1,000,000 characters"),
    "merges of tokens that are none": ({"merges": [["zz", "yy"]]}, "cannot be opened"),
    "merges of three": ({"merges": [["a", "b", "c"]]}, "model.merges is wrong"),
    "merges of numbers": ({"merges": [[1, 2]]}, "model.merges is wrong"),
    "a merge without a space": ({"merges": ["ab"]}, "model.merges is wrong"),
    "merges that are a text": ({"merges": "a b"}, "model.merges is wrong"),
    "a merge that is null": ({"merges": [None]}, "model.merges is wrong"),
    "more merges than anybody has": ({"merges": ["a b"] * 2_000_001}, "at most 2,000,000 merges"),
    "dropout of 7": ({"dropout": 7}, "model.dropout is wrong"),
    "dropout that is a text": ({"dropout": "x"}, "model.dropout is wrong"),
    "an unknown token that is a number": ({"unk_token": 5}, "model.unk_token is wrong"),
    "an unknown kind": ({"type": "Evil"}, "cannot be opened"),
    "a kind that is a number": ({"type": 5}, "model.type is wrong"),
    "Unigram without tokens": ({"type": "Unigram", "vocab": [], "unk_id": 5}, "cannot be opened"),
    "Unigram of texts": ({"type": "Unigram", "vocab": ["a"]}, "model.vocab is wrong: a is no token with its score"),
    "Unigram with an unknown id": ({"type": "Unigram", "vocab": [["a", 0.5]], "unk_id": 7}, "cannot be opened"),
    "Unigram with a negative id": ({"type": "Unigram", "vocab": [["a", 0.5]], "unk_id": -7}, "model.unk_id is wrong"),
    "Unigram with a score that is a text": ({"type": "Unigram", "vocab": [["a", "x"]]}, "model.vocab is wrong"),
    "WordPiece of words without end": (
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 1 << 50,
         "continuing_subword_prefix": "##"}, "model.max_input_chars_per_word is wrong",
    ),
    "a Unigram's vocabulary in a BPE": ({"vocab": [["a", 0.5]]}, "cannot be opened"),
}  # fmt: skip


def unlinked(folder: Path, name: str) -> Path:
    (folder / name).unlink(missing_ok=True)
    return folder / name


def big(name: str, size: int) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        unlinked(folder, name).write_bytes(b"")
        os.truncate(folder / name, size)

    return apply


def linked(name: str) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        (folder.parent / "secret").write_text("{}")
        unlinked(folder, name).symlink_to(folder.parent / "secret")

    return apply


def broken_model(folder: Path) -> None:
    (folder / JSON).unlink()
    (folder / MODEL).write_bytes(b"\x0a\xff\xff\xff\xff\xff")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tokenizer.json of 65 MB": (big(JSON, 65_000_000), "too many for a file of its kind"),
    "a configuration of a terabyte": (big(CONFIG, 1 << 40), "too many for a file of its kind"),
    "a tokenizer.model of a terabyte": (big(MODEL, 1 << 40), "too many for a file of its kind"),
    "merges.txt of a terabyte": (big("merges.txt", 1 << 40), "too many for a file of its kind"),
    "a template of 100 MB": (big("chat_template.jinja", 100_000_000), "too many for a file of its kind"),
    "values by the million": (
        lambda folder: (folder / JSON).write_text('{"model": [' + "[]," * 2_100_000 + "0]}"),
        "model is wrong|values",
    ),
    "chat_template.json that is a list": (
        lambda folder: (folder / "chat_template.json").write_text("[]"),
        "chat_template.json",
    ),
    "chat_template.json of numbers": (
        lambda folder: (folder / "chat_template.json").write_text('{"chat_template": 5}'),
        "chat_template is wrong",
    ),
    "a pickle as tokenizer.json": (
        lambda folder: (folder / JSON).write_bytes(p.exploit(folder.parent / "marker")),
        "is not valid JSON",
    ),
    "nothing but a SentencePiece model that is none": (
        broken_model,
        r"cannot be opened|lacks .* to read it",  # as sentencepiece and protobuf are installed or not
    ),
    "nothing at all": (emptied, "cannot be opened"),
    **{
        f"{name} is a link to a secret": (linked(name), "is a link out of the folder")
        for name in (JSON, CONFIG, MAP, ADDED, VOCAB, MODEL, "merges.txt", "chat_template.jinja", "chat_template.json")
    },
    **{
        f"{name} is a pipe": (
            lambda folder, name=name: os.mkfifo(unlinked(folder, name)),  # type: ignore[misc]
            "is neither a file nor a folder",
        )
        for name in (JSON, CONFIG, MAP, MODEL)
    },
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("good") / "tokenizer")


@pytest.fixture
def folder(tmp_path: Path, good: Path) -> Path:
    shutil.copytree(good, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def refused(folder: Path, capfd: pytest.CaptureFixture[str], *parts: str) -> str:
    """The first line of the refusal, which holds these parts."""
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(folder, "base")
    what, hint = caught.value.what, caught.value.hint
    assert hint and "\n" not in what + hint and len(what) < 600 and what.isprintable(), what
    assert what.startswith("base: ") and all(part in what for part in parts), what
    assert not list(folder.parent.rglob("marker"))
    assert "panicked" not in capfd.readouterr().err
    return what


def given(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}-{at}") for key, values in table.items() for at, value in enumerate(values)
    ]


def change(folder: Path, name: str, **parts: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **parts}))


@pytest.mark.parametrize(("key", "value"), given(WRONG))
def test_a_configuration_with_a_wrong_value(folder: Path, capfd: Any, key: str, value: Any) -> None:
    change(folder, CONFIG, **{key: value})
    refused(folder, capfd, CONFIG, key)


@pytest.mark.parametrize(("key", "value"), given(WRONG_MAP))
def test_a_map_of_special_tokens_with_a_wrong_value(folder: Path, capfd: Any, key: str, value: Any) -> None:
    change(folder, MAP, **{key: value})
    refused(folder, capfd, MAP, key)


@pytest.mark.parametrize("number", range(len(WRONG_ADDED)))
@pytest.mark.parametrize("name", [ADDED, VOCAB])
def test_a_table_of_tokens_with_a_wrong_value(folder: Path, capfd: Any, name: str, number: int) -> None:
    value = WRONG_ADDED[number]
    (folder / name).write_text(json.dumps(value))
    if name == VOCAB and isinstance(value, dict) and len(value) > 100:
        open_tokenizer(folder, "base")  # vocabularies have that many, and tokenizer.json goes first
    else:
        refused(folder, capfd, name)


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("file", [JSON, CONFIG, MAP, ADDED])
def test_a_file_that_is_no_json(folder: Path, capfd: Any, file: str, name: str) -> None:
    text = RAW[name]
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, capfd, file)


LARGE = ("a million tokens", "300,000 added tokens", "more merges than anybody has")


def names(*tables: dict[str, Any]) -> list[Any]:
    """Of payloads; those that take seconds to write are slow ones."""
    slow = {name: [pytest.mark.slow] for name in LARGE}
    return [pytest.param(name, marks=slow.get(name, [])) for table in tables for name in table]


@pytest.mark.parametrize("name", names(PARTS))
def test_a_part_of_tokenizer_json(folder: Path, capfd: Any, name: str) -> None:
    parts, message = PARTS[name]
    change(folder, JSON, **parts)
    what = refused(folder, capfd)
    assert re.search(message, what), what


@pytest.mark.parametrize("name", names(MODELS))
def test_a_model_of_tokenizer_json(folder: Path, capfd: Any, name: str) -> None:
    parts, message = MODELS[name]
    model = json.loads((folder / JSON).read_text())["model"]
    change(folder, JSON, model={**model, **parts}, added_tokens=[])
    what = refused(folder, capfd)
    assert re.search(message, what), what


@pytest.mark.parametrize("name", FILES)
def test_what_stands_under_a_files_name(folder: Path, capfd: Any, name: str) -> None:
    apply, message = FILES[name]
    apply(folder)
    what = refused(folder, capfd)
    assert re.search(message, what), what


# These open: odd, but nothing of them is used in a way that could hurt.
HARMLESS: dict[str, Content] = {
    "an id of a billion": {"added_tokens_decoder": {"1000000000": TOKEN}},
    "no limit of length": {"model_max_length": int(1e30)},
    "a class that nobody knows": {"tokenizer_class": "EvilTokenizer"},
    "keys of the future": {"x": [1, {"y": 2}], "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
    "notes on where files were": {
        "tokenizer_file": "/etc/passwd",
        "name_or_path": "/etc",
        "special_tokens_map_file": "x",
    },
    "two templates": {"chat_template": [{"name": "default", "template": "a"}, {"name": "b", "template": "c"}]},
    "nulls": dict.fromkeys(("bos_token", "unk_token", "legacy", "chat_template", "tokenizer_class")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_but_harmless(folder: Path, name: str) -> None:
    change(folder, CONFIG, **HARMLESS[name])
    assert len(open_tokenizer(folder, "base")("What is it?")["input_ids"]) > 1


@pytest.mark.parametrize("make", [byte_level, llama2, gemma], ids=lambda make: make.__name__)
def test_good_ones_open(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert open_tokenizer(make(tmp_path / "tokenizer"), "base").is_fast


def test_a_panic_over_a_text_is_a_refusal(folder: Path, capfd: Any) -> None:
    """Ways by the billion that no look at the pattern finds: the engine gives up, which is no Exception."""
    pattern = {"Regex": r"(?:.|.)*[xq][yz]"}
    change(folder, JSON, pre_tokenizer={**SPLIT, "pattern": pattern})
    refused(folder, capfd, "cannot be opened", "retry-limit-in-match")


GGUF = [name for name in (*PARTS, *MODELS) if name not in (*LARGE, "the same in a decoder")]


@pytest.mark.parametrize("name", GGUF)
def test_an_export_to_gguf_refuses_the_same(folder: Path, name: str) -> None:
    """Where the vocabulary of an adapter's own tokenizer is read."""
    parts, _ = {**PARTS, **MODELS}[name]
    if name in MODELS:
        parts = {"model": {**json.loads((folder / JSON).read_text())["model"], **parts}, "added_tokens": []}
    change(folder, JSON, **parts)
    with pytest.raises(QloraError) as caught:
        read_vocab(folder, 3000)
    assert caught.value.hint and len(caught.value.what) < 600
