"""Which of llama.cpp's pre-tokenizers cuts text as this tokenizer does.

llama.cpp knows a pre-tokenizer by a name (`tokenizer.ggml.pre`), behind which its regular expressions stand in its
source. Its own converter finds the name by a hash of the ids of one text, which depends on the BOS token and on every
merge, so that a tokenizer trained on other text is unknown and Llama 3's without BOS another one's. Here the structure
is compared: the normalizer, each split in its order, the byte level, and whether a whole word that is a token skips
the merges. Each entry of KNOWN is tried against llama.cpp on all probe texts in tests/export/gguf/test_vocab.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ExportError
from qlora.export.gguf.probes import Limit

OVERRIDE = "name llama.cpp's pre-tokenizer that cuts text alike with `tokenizer_pre`, if you know one"
_SHOWN = 200  # characters of a pattern in a message
BYTES = "byte level"  # the step that maps bytes to letters; only falcon's digits come after it

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
TEKKEN = rf"{_CAPITALS}|{_SMALL}|\p{{N}}|{_PATHS}|{_SPACES}"
GPT4O = rf"{_CAPITALS}{_CONTRACTIONS}?|{_SMALL}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
SEED_CODER = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
DEEPSEEK3 = (
    r'[!"#$%&'
    r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_CJK_BLOCKS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters that have a capital and a small form (written as escapes: some of them change when a text is composed).
_SIGN_BLOCKS = r"\s?" + "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CASED_LETTERS = (
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)


@dataclass(frozen=True)
class Known:
    """One of llama.cpp's pre-tokenizers: its name and the structure that it stands for."""

    pre: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    limit: Limit | None = None  # where llama.cpp's own regular expression is not quite the tokenizer's


# llama.cpp's names and regular expressions: src/llama-vocab.cpp, llm_tokenizer_bpe (2026-10). Of several names for one
# structure (starcoder, refact, command-r, smollm; gpt-2, olmo, phi-2, exaone4; llama-bpe, falcon-h1, lfm2, pixtral;
# smaug-bpe, dbrx, chatglm-bpe, glm4) one stands here: they differ in what they do to spaces when a text is put together
# again at most, and in ids and flags that we always write.
KNOWN = (
    Known("gpt-2", (GPT2, BYTES)),
    Known("llama-bpe", (LLAMA3, BYTES), ignore_merges=True),
    Known("smaug-bpe", (LLAMA3, BYTES)),
    Known("qwen2", (QWEN2, BYTES)),
    Known("qwen35", (QWEN35, BYTES)),
    Known("smollm", (r"\p{N}", GPT2, BYTES)),
    Known("tekken", (TEKKEN, BYTES), ignore_merges=True, limit=Limit.LETTER_CASE),
    Known("gpt-4o", (GPT4O, BYTES), limit=Limit.LETTER_CASE),
    Known("seed-coder", (SEED_CODER, BYTES)),
    Known("minicpm5", (r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+"), BYTES), ignore_merges=True),
    Known("deepseek-llm", (r"[\r\n]", _CASED_LETTERS, _SIGN_BLOCKS, r"\s+$", _CJK_BLOCKS, r"\p{N}", BYTES)),
    Known("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_BLOCKS, r"\p{N}", BYTES)),
    Known("deepseek-v3", (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3, BYTES)),
    Known("falcon", ("punctuation", GPT2, BYTES, "[0-9][0-9][0-9]")),
)
# Other spellings of the same thing. `'(?i:…)` and its like match as the list does. A possessive `?+` or `++` before a
# class without what follows matches as the plain one. `\s*[\r\n]` reaches the last line break as `\s*[\r\n]+` does.
_SPELLINGS = (
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("(?i:'[sdmt]|'ll|'ve|'re)", _CONTRACTIONS),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    (r"]?+\p{L}+", r"]?\p{L}+"),
    (r"]++", r"]+"),
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)
# A Split's behavior and inversion that cut at its matches and lose nothing: "Removed" and "invert" keep the matches
# only, and the regular expressions written so match every character.
_LOSSLESS_SPLITS = {("Isolated", False), ("Removed", True)}


@dataclass(frozen=True)
class Match:
    """The name to write, and what llama.cpp does differently all the same."""

    pre: str
    limits: tuple[Limit, ...] = ()


def match(tokenizer: Mapping[str, Any], folder: Path) -> Match:
    """The pre-tokenizer of a byte-level BPE tokenizer, given as the content of its tokenizer.json.

    Raises ExportError for a normalizer or a way of splitting that llama.cpp has no name for.
    """
    limits = _normalizer_limits(tokenizer.get("normalizer"), folder)
    steps = tuple(_steps(tokenizer.get("pre_tokenizer"), folder))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    alike = [known for known in KNOWN if known.steps == steps]
    if not alike:
        splits = " then ".join(repr(step[:_SHOWN]) for step in steps[:5]) or "nothing"
        raise ExportError(f"{folder}: llama.cpp has no pre-tokenizer that splits by {splits}", OVERRIDE)
    best = next((known for known in alike if known.ignore_merges == ignore_merges), alike[0])
    if best.ignore_merges != ignore_merges and (stray := _unmergeable(tokenizer)) is not None:
        raise ExportError(
            f"{folder}: the token {stray!r} can be reached {'only' if ignore_merges else 'not'} as a whole word, "
            f"which llama.cpp's pre-tokenizer {best.pre!r} does {'not ' if ignore_merges else ''}do",
            OVERRIDE,
        )
    return Match(best.pre, limits + ((best.limit,) if best.limit else ()))


def spelled(regex: str) -> str:
    """A regular expression in the spelling of KNOWN."""
    for other, ours in _SPELLINGS:
        regex = regex.replace(other, ours)
    return regex


def _normalizer_limits(normalizer: Mapping[str, Any] | None, folder: Path) -> tuple[Limit, ...]:
    kinds = [part["type"] for part in flat(normalizer, "normalizers")]
    if set(kinds) <= {"NFC"}:
        return (Limit.COMPOSITION,) if kinds else ()
    shown = ", ".join(str(kind)[:40] for kind in kinds[:5])
    raise ExportError(f"{folder}: llama.cpp cannot normalize text as this tokenizer does ({shown})", OVERRIDE)


def _steps(pre_tokenizer: Mapping[str, Any] | None, folder: Path) -> list[str]:
    steps: list[str] = []
    for part in flat(pre_tokenizer, "pretokenizers"):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps += [GPT2] if part.get("use_regex", True) else []
            steps.append(BYTES)
        elif kind == "Split" and (part.get("behavior"), bool(part.get("invert"))) in _LOSSLESS_SPLITS:
            steps.append(spelled(str(part["pattern"].get("Regex", part["pattern"].get("String")))))
        elif kind == "Digits":
            steps.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif kind == "Punctuation" and part.get("behavior") == "Contiguous":
            steps.append("punctuation")
        else:
            settings = ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "type")
            raise ExportError(f"{folder}: llama.cpp cannot pre-tokenize by {kind}({settings})", OVERRIDE)
    return steps


def flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """A component and the members of its sequences, in order."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for member in part[inner] for step in flat(member, inner)]


def _unmergeable(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that its own merges do not build, or None: without one, skipping the merges changes nothing.

    Added tokens are cut out of the text before it comes to merges.
    """
    from tokenizers import models

    vocab, merges = tokenizer["model"]["vocab"], merge_pairs(tokenizer["model"])
    added = {token["content"] for token in tokenizer.get("added_tokens") or ()}
    bpe = models.BPE(vocab=vocab, merges=merges)
    return next((word for word in vocab if word not in added and len(bpe.tokenize(word)) != 1), None)


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in their order; older files write "left right" as one string."""
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in split]
