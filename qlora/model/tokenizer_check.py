"""A tokenizer's files, checked before a library opens them: types, ranges and counts, and what would grow or never end.

transformers and tokenizers have no bounds of their own: they add 300,000 special tokens in ten minutes, take a path out
of a table of tokens, and give up inside themselves (a panic) over what they did not expect. Bounds are several times
what the largest tokenizers known to us have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qlora import files, foreign_json
from qlora.errors import TokenizerError
from qlora.foreign_json import ForeignFileError, ForeignModel
from qlora.model.split_patterns import repeats_repeated

MAX_BYTES = 64_000_000  # Gemma 3's tokenizer.json has 33 MB
MAX_VOCAB = 1 << 20  # XLM-V has 902,000
MAX_MERGES = 2_000_000  # Gemma 3 has 515,000
# Llasa, a model of speech, has 65,536 tokens for sounds behind Llama's. 100,000 take transformers 3 s to add.
MAX_ADDED = 100_000
# Of tokens in a list of special ones: transformers compares each with all, 4 s for so many, 8 s for 40,000.
MAX_SPECIAL = 30_000
MAX_ID = 1 << 31
MAX_TOKEN = 10_000  # characters; Gemma's longest run of spaces has 31
MAX_TEMPLATE = 1_000_000  # characters; gpt-oss' template has 17,000
MAX_TEMPLATES = 64
MAX_STEPS = 10_000  # of normalizing, splitting and post-processing, and values of what they are made of
MAX_PATTERN = 20_000  # characters; the longest known to us, DeepSeek's, has 3,000
# By how much normalizing may lengthen a text: NFKD makes at most 18 characters of one.
MAX_GROWTH = 32

_HINT = "get a clean copy of the model, or repair the file"


def _no_halves(value: Any) -> Any:
    if isinstance(value, str) and any(0xD800 <= ord(sign) < 0xE000 for sign in value):
        raise ValueError("holds half of a character")
    return value


Token = Annotated[str, Field(max_length=MAX_TOKEN), BeforeValidator(_no_halves)]


class AddedToken(ForeignModel):
    """A token as transformers and tokenizers write it."""

    content: Token
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    single_word: bool = False
    special: bool = False


class NumberedToken(AddedToken):
    """The same in tokenizer.json."""

    id: Annotated[int, Field(ge=0, lt=MAX_ID)]


def _one_token(value: Any) -> Any:
    if isinstance(value, dict):
        AddedToken.model_validate({key: part for key, part in value.items() if part is not None})
    elif not isinstance(value, str):
        raise ValueError("is no token (a text, or a table with its content)")
    elif len(value) > MAX_TOKEN:
        raise ValueError(f"has {len(value):,} characters")
    return _no_halves(value)


def _tokens(value: Any) -> Any:
    """A list of tokens, or a table from their names to them."""
    given = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(given, list):
        raise ValueError("is no list of tokens")
    if len(given) > MAX_SPECIAL:
        raise ValueError(f"has {len(given):,} tokens, at most {MAX_SPECIAL:,} can be opened")
    for token in given:
        _one_token(token)
    return value


def _templates(value: Any) -> Any:
    """A chat template, or several with their names."""
    given = value
    if isinstance(value, str):
        given = {"default": value}
    elif isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if not all(isinstance(part.get("name"), str) for part in value):
            raise ValueError("has a template without a name")
        given = {part["name"]: part.get("template") for part in value}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError("is neither a template nor a list of named templates")
    for text in given.values():
        _no_halves(text)
    if len(given) > MAX_TEMPLATES or sum(map(len, given.values())) > MAX_TEMPLATE:
        raise ValueError(f"has more than {MAX_TEMPLATES} templates or {MAX_TEMPLATE:,} characters")
    return value


def _length(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value <= 0:
        raise ValueError("is no length")
    return value


def _decoder(value: Any) -> Any:
    """Ids, as texts, to tokens."""
    if not isinstance(value, dict):
        raise ValueError("is no table from ids to tokens")
    if len(value) > MAX_ADDED:
        raise ValueError(f"has {len(value):,} tokens, at most {MAX_ADDED:,} can be opened")
    for number, token in value.items():
        if not number.isascii() or not number.isdigit() or len(number) > 10 or int(number) >= MAX_ID:
            raise ValueError(f"{number[:40]!r} is no token id")
        if not isinstance(token, dict):
            raise ValueError(f"{number} is no token (a table with its content)")
        _one_token(token)
    return value


def _no_inputs(value: Any) -> Any:
    if value not in ([], {}):
        raise ValueError("gives its class arguments of its own")
    return value


OneToken = Annotated[Any, BeforeValidator(_one_token)]
Tokens = Annotated[Any, BeforeValidator(_tokens)]
Templates = Annotated[Any, BeforeValidator(_templates)]
Name = Annotated[str, Field(max_length=200, pattern=r"^[\w.\-]*$")]
Side = Literal["left", "right"]


class SpecialTokens(ForeignModel):
    """special_tokens_map.json, and the same keys of tokenizer_config.json."""

    bos_token: OneToken = ""
    eos_token: OneToken = ""
    unk_token: OneToken = ""
    sep_token: OneToken = ""
    pad_token: OneToken = ""
    cls_token: OneToken = ""
    mask_token: OneToken = ""
    additional_special_tokens: Tokens = ()
    extra_special_tokens: Tokens = ()
    model_specific_special_tokens: Tokens = ()


class TokenizerConfig(SpecialTokens):
    """The keys of tokenizer_config.json that transformers reads whatever the class is."""

    tokenizer_class: Name = ""
    processor_class: Name = ""
    model_max_length: Annotated[Any, BeforeValidator(_length)] = 1
    padding_side: Side = "right"
    truncation_side: Side = "right"
    chat_template: Templates = ""
    added_tokens_decoder: Annotated[Any, BeforeValidator(_decoder)] = ()
    init_inputs: Annotated[Any, BeforeValidator(_no_inputs)] = ()
    model_input_names: Annotated[list[Name], Field(max_length=100)] = Field(default_factory=list)
    add_bos_token: bool = False
    add_eos_token: bool = False
    add_prefix_space: bool = False
    clean_up_tokenization_spaces: bool = False
    split_special_tokens: bool = False
    legacy: bool = False
    errors: Name = ""


class _Template(ForeignModel):
    chat_template: Templates


def _table(value: Any, most: int) -> Any:
    if not isinstance(value, dict) or not all(type(n) is int and 0 <= n < MAX_ID for n in value.values()):
        raise ValueError("is no table from tokens to ids")
    if len(value) > most:
        raise ValueError(f"has {len(value):,} tokens, at most {most:,} can be opened")
    _check_lengths(value)
    return value


def _check_lengths(tokens: Mapping[str, Any] | list[str]) -> None:
    if len(longest := max(tokens, key=len, default="")) > MAX_TOKEN:
        raise ValueError(f"has a token of {len(longest):,} characters")


def _vocab(value: Any) -> Any:
    """Tokens to ids; of a Unigram model, pairs of token and score."""
    if not isinstance(value, list):
        return _table(value, MAX_VOCAB)
    if len(value) > MAX_VOCAB:
        raise ValueError(f"has {len(value):,} tokens, at most {MAX_VOCAB:,} can be opened")
    for pair in value:
        good = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not good or type(pair[1]) not in (int, float) or not math.isfinite(pair[1]):
            raise ValueError(f"{str(pair)[:60]} is no token with its score")
    _check_lengths([pair[0] for pair in value])
    return value


def _merges(value: Any) -> Any:
    if not isinstance(value, list) or len(value) > MAX_MERGES:
        raise ValueError(f"is no list of at most {MAX_MERGES:,} merges")
    for merge in value:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{str(merge)[:60]!r} is no pair of tokens")
    return value


class _Model(ForeignModel):
    type: Name | None = None
    vocab: Annotated[Any, BeforeValidator(_vocab)]
    merges: Annotated[Any, BeforeValidator(_merges)] = ()
    unk_token: Token | None = None
    unk_id: Annotated[int, Field(ge=0, lt=MAX_ID)] | None = None
    dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    continuing_subword_prefix: Token | None = None
    end_of_word_suffix: Token | None = None
    max_input_chars_per_word: Annotated[int, Field(ge=0, le=MAX_TOKEN)] = 100
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


def _steps(value: Any) -> Any:
    """A step of the tokenizer's, or a sequence of them."""
    if not isinstance(value, dict):
        raise ValueError("is no step of a tokenizer")
    for number, (key, part) in enumerate(_walk(value)):
        if number == MAX_STEPS:
            raise ValueError(f"is made of more than {MAX_STEPS:,} values")
        long = isinstance(part, str) and len(part) > MAX_PATTERN
        if long and key != "precompiled_charsmap":  # 300 kB of base64 in T5's
            raise ValueError(f"{key} has {len(part):,} characters")
        if key == "Regex" and isinstance(part, str) and repeats_repeated(part):
            raise ValueError(f"the pattern {part[:60]!r} repeats what is repeated, which may take for ever to match")
    if (growth := _growth(value)) > MAX_GROWTH:
        raise ValueError(f"makes {growth:,.0f} characters of one")
    return value


Steps = Annotated[Any, BeforeValidator(_steps)]


class TokenizerJson(ForeignModel):
    """tokenizer.json, as the library tokenizers writes it."""

    model: _Model
    added_tokens: Annotated[list[NumberedToken], Field(max_length=MAX_ADDED)] = Field(default_factory=list)
    normalizer: Steps = None
    pre_tokenizer: Steps = None
    post_processor: Steps = None
    decoder: Steps = None


class _AddedTokens(ForeignModel):
    tokens: Annotated[Any, BeforeValidator(lambda value: _table(value, MAX_ADDED))]


class _Vocab(ForeignModel):
    tokens: Annotated[Any, BeforeValidator(_vocab)]


def check_tokenizer(folder: Path, name: str) -> None:
    """Look at a tokenizer's files as far as libraries read them. `name` is whose tokenizer it is.

    Raises TokenizerError with file, key and value for what is of another type, out of range, or too much; and for
    files that are no plain ones of this folder.
    """
    try:
        for file, model in _MODELS.items():
            if (content := _read(folder, file)) is not None:
                whole = {"tokens": content} if model in (_AddedTokens, _Vocab) else content
                foreign_json.checked(model, {k: v for k, v in whole.items() if v is not None}, f"{name}: {file}")
                if model is SpecialTokens:
                    _check_names(content, f"{name}: {file}")
        for file in ("tokenizer.model", "merges.txt", "chat_template.jinja"):
            if (path := files.inside(folder, file)).exists():
                files.open_to_read(path, MAX_BYTES if file != "chat_template.jinja" else 4 * MAX_TEMPLATE).close()
    except (ForeignFileError, files.UnsafePathError) as error:
        what = str(error).replace(f"{folder.resolve()}{os.sep}", f"{name}: ")
        raise TokenizerError(what if what.startswith(f"{name}: ") else f"{name}: {what}", _HINT) from error


_MODELS: dict[str, type[ForeignModel]] = {
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": SpecialTokens,
    "chat_template.json": _Template,
    "added_tokens.json": _AddedTokens,
    "vocab.json": _Vocab,
    "tokenizer.json": TokenizerJson,
}


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = files.inside(folder, name)
    return foreign_json.load_object(path, MAX_BYTES) if path.exists() else None


def _check_names(content: Mapping[str, Any], where: str) -> None:
    """transformers takes every key of this file for an argument of the tokenizer's class, paths among them."""
    for key in content:
        if not key.endswith(("_token", "_tokens")):
            raise ForeignFileError(f"{where}: {key[:60]!r} is no special token's name")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value at any depth of a step, with its key."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, part = waiting.pop()
        yield key, part
        if isinstance(part, dict):
            waiting.extend(part.items())
        elif isinstance(part, list):
            waiting.extend((key, item) for item in part)


def _growth(value: Any) -> float:
    """By how much replacements, one after the other, can lengthen a text."""
    growth = 1.0
    for _, part in _walk(value):
        if isinstance(part, dict) and isinstance(part.get("content"), str):
            pattern = part.get("pattern")
            text = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(part["content"]) / max(1, len(text) if isinstance(text, str) else 1))
    return growth
