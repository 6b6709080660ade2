"""A byte-level tokenizer's structure is matched to llama.cpp's name for it, and to no name where none is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ExportError
from qlora.export.gguf import pretokenizer
from qlora.export.gguf.pretokenizer import BYTES, GPT2, KNOWN, LLAMA3, QWEN2, Known, Match, match, spelled
from qlora.export.gguf.probes import PROBE_TEXTS, Limit, comparable
from qlora.export.gguf.vocab import metadata
from tests import tokenizers
from tests.export.gguf.asked import changed, differing, read

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


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("families", "part", "ignore_merges", "pre"),
    [
        ("SmolLM3, LFM2", split(LLAMA3), True, "llama-bpe"),
        ("OLMo 2 and 3, GLM-4", split(LLAMA3), False, "smaug-bpe"),
        ("Granite 4, Phi-4", split(CL100K, "Removed", True), False, "smaug-bpe"),
        (
            "Granite 3, StarCoder 2, Cohere 2",
            {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
            False,
            "smollm",
        ),
        ("Phi-2, OLMo 1", BYTE_LEVEL, False, "gpt-2"),
        ("Phi-4-mini", split(pretokenizer.GPT4O, "Removed", True), False, "gpt-4o"),
        ("Ministral 3", split(pretokenizer.TEKKEN), True, "tekken"),
        ("Qwen 3.5", split(pretokenizer.QWEN35), False, "qwen35"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_structures_of_this_years_families(families: str, part: dict[str, Any], ignore_merges: bool, pre: str) -> None:
    found = content(KNOWN[0], pre_tokenizer=part)
    stray = {"a": 0, "b": 1, "ab": 2, "cab": 3}  # "cab" is reached as a whole word only
    found["model"] |= {"ignore_merges": ignore_merges, "vocab": stray if ignore_merges else found["model"]["vocab"]}
    assert match(found, HERE).pre == pre


@pytest.mark.parametrize(
    ("tokenizer_class", "pre"),
    [("Qwen3_5Tokenizer", "qwen35"), ("CohereTokenizer", "smollm"), ("Qwen2Tokenizer", "qwen2")],
)
def test_structures_that_transformers_builds_by_class(tmp_path: Path, tokenizer_class: str, pre: str) -> None:
    """Read is what transformers makes of the folder: these classes bring their own structure, composition first."""
    folder = changed(tokenizers.byte_level(tmp_path, pre), "tokenizer_config.json", tokenizer_class=tokenizer_class)
    found = read(folder)
    assert (found.pre, Limit.COMPOSITION in found.limits) == (pre, True)
    assert differing(folder, metadata(found), comparable(PROBE_TEXTS, found.limits, found.specials)) == []
