"""A byte-level tokenizer's structure is matched to llama.cpp's name for it, and to no name where none is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ExportError
from qlora.export.gguf import pretokenizer
from qlora.export.gguf.pretokenizer import BYTES, GPT2, KNOWN, LLAMA3, QWEN2, Known, Match, match, spelled
from qlora.export.gguf.probes import Limit
from tests import tokenizers

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart" / "base"
HERE = Path("base")


def content(known: Known, **changes: Any) -> dict[str, Any]:
    """The content of a tokenizer.json with this structure and two merges."""
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]], "ignore_merges": known.ignore_merges}
    return {"normalizer": None, "pre_tokenizer": tokenizers.pre_tokenizer(known), "model": model, **changes}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.pre)
def test_each_structure_has_its_name(known: Known) -> None:
    assert match(content(known), HERE).pre == known.pre


def test_no_two_names_for_one_structure() -> None:
    assert len({(known.steps, known.ignore_merges) for known in KNOWN}) == len(KNOWN)


@pytest.mark.parametrize(
    "regex",
    [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        LLAMA3.replace(r"\r\n", "\r\n"),
        LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
    ],
)
def test_other_spellings_of_llama_3(regex: str) -> None:
    assert regex != LLAMA3
    assert spelled(regex) == LLAMA3
    assert match(content(KNOWN[0], pre_tokenizer=split(regex)), HERE).pre == "smaug-bpe"


def test_a_split_that_keeps_its_matches_is_one_that_isolates_them() -> None:
    assert match(content(KNOWN[0], pre_tokenizer=split(QWEN2, "Removed", True)), HERE) == Match("qwen2")


def test_the_quickstarts_base_has_llama_3s_split_without_its_shortcut() -> None:
    """Told by ids it was another model's, since it has no BOS and other merges."""
    assert match(json.loads((QUICKSTART / "tokenizer.json").read_text(encoding="utf-8")), HERE) == Match("smaug-bpe")


def test_an_unknown_split_is_refused_with_its_regex() -> None:
    with pytest.raises(ExportError) as error:
        match(content(KNOWN[0], pre_tokenizer=split(r"\w+|\W+")), HERE)
    assert repr(r"\w+|\W+") in error.value.what
    assert "`tokenizer_pre`" in error.value.hint


@pytest.mark.parametrize(
    "part",
    [
        {"type": "Whitespace"},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "MergedWithNext", "invert": False},
    ],
    ids=lambda part: part["type"],
)
def test_steps_that_llama_cpp_has_not_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=part["type"]):
        match(content(KNOWN[0], pre_tokenizer=part), HERE)


def test_normalizers_are_composition_or_refused() -> None:
    assert match(content(KNOWN[0], normalizer={"type": "NFC"}), HERE).limits == (Limit.COMPOSITION,)
    empty = {"type": "Sequence", "normalizers": []}
    assert match(content(KNOWN[0], normalizer=empty), HERE).limits == ()
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(ExportError, match="Lowercase"):
        match(content(KNOWN[0], normalizer=both), HERE)


def test_whole_words_matter_only_where_merges_do_not_build_them() -> None:
    """qwen2 in llama.cpp always merges: the same, unless a token is beyond its own merges."""
    qwen2 = next(known for known in KNOWN if known.pre == "qwen2")
    found = content(qwen2)
    found["model"]["ignore_merges"] = True
    assert match(found, HERE).pre == "qwen2"
    found["model"]["vocab"]["cab"] = 5
    with pytest.raises(ExportError, match="'cab'"):
        match(found, HERE)
    found["added_tokens"] = [tokenizers.added("cab", 5)]
    assert match(found, HERE).pre == "qwen2"


def test_merges_of_both_ages_are_read() -> None:
    assert pretokenizer.merge_pairs({"merges": ["a b", ["Ġ", "c"]]}) == [("a", "b"), ("Ġ", "c")]


def test_the_byte_level_alone_is_gpt_2() -> None:
    alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert match(content(KNOWN[0], pre_tokenizer=alone), HERE).pre == "gpt-2"
    assert KNOWN[0].steps == (GPT2, BYTES)
