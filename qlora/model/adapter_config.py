"""What an adapter's two JSON files say, checked: adapter_config.json as peft writes it, and our own qlora.json.

An adapter is a stranger's. Every key that is read has a type and bounds; keys that are not known are let pass, since
newer versions write more. Patterns for module names are regular expressions in peft, matched by an engine that can be
made to run for years; here they go through one without backtracking, and names without any of its signs are compared
as text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import SchemaValidator

from qlora import files, foreign_json, linear_regex
from qlora.errors import ExportError
from qlora.foreign_json import ForeignFileError, ForeignModel
from qlora.model.identity import BaseIdentity
from qlora.recipe.sections import QuantizationSection

MAX_RANK = 1 << 20  # the tensors' own shapes are the real bound: more than any hidden size
MAX_ALPHA = 1e9
MAX_ENTRIES = 100_000  # of a list or a table; a 70B model has 560 modules with adapters
MAX_TOKEN_ROWS = 1_000_000
MAX_NAME = 1_000  # characters; the longest module name known to us has 80
MAX_PATH = 4_096  # PATH_MAX of Linux
# Regular expressions among the patterns: one takes up to 40 ms to compile. Tools write names; people write a few.
MAX_REGEXES = 100
# How much matching may be asked for: the sum over all of them of their length, times what their counted repetitions
# multiply it by, times the number of modules. Measured for the worst patterns found: 0.1 µs a unit, 2 s in all.
MAX_MATCHING = linear_regex.MOST_COST
# peft is given a pattern for each value. EVA, which gives out the most different ranks, stays below 64.
MAX_DISTINCT = 256

_HINT = "save the adapter again, or get a clean copy of it"
_PLAIN = re.compile(r"[\w.\-]+")

Number = TypeVar("Number", int, float)


def _text(value: Any) -> Any:
    if isinstance(value, str) and any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in value):
        raise ValueError("holds control characters or half of a character")
    return value


def _names(value: Any) -> Any:
    """A list of texts, or one text."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError("is neither a name nor a list of names")
    if len(given) > MAX_ENTRIES or any(len(name) > MAX_NAME for name in given):
        raise ValueError(f"has more than {MAX_ENTRIES:,} names, or one of more than {MAX_NAME:,} characters")
    return value


def _plain_names(value: Any) -> Any:
    """peft puts each of them into a regular expression as it is."""
    _names(value)
    if odd := [name for name in ([value] if isinstance(value, str) else value) if not _PLAIN.fullmatch(name)]:
        raise ValueError(f"{shown(odd[0])} is not a module's name")
    return [value] if isinstance(value, str) else value


def _token_rows(value: Any) -> Any:
    """Token ids, or for each of several modules its own."""
    for ids in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(ids, list) or not all(type(number) is int and number >= 0 for number in ids):
            raise ValueError("is no list of token ids, nor a table of such lists")
        if len(ids) > MAX_TOKEN_ROWS:
            raise ValueError(f"has {len(ids):,} token ids")
        if len(set(ids)) != len(ids):
            raise ValueError(f"has the token id {Counter(ids).most_common(1)[0][0]} twice")
    if isinstance(value, dict):
        _plain_names(list(value))
    return value


def _start(value: Any) -> Any:
    if not isinstance(value, bool | str):
        raise ValueError("is neither true, false nor a name")
    return value


Text = Annotated[str, BeforeValidator(_text)]
Names = Annotated[list[str] | str, BeforeValidator(_names)]
PlainNames = Annotated[list[str], BeforeValidator(_plain_names)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=MAX_ALPHA)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class AdapterConfig(ForeignModel):
    """The keys of peft's adapter_config.json that are read here. null is the default, as in peft."""

    peft_type: Annotated[Text, Field(max_length=MAX_NAME)]
    r: Rank
    lora_alpha: Alpha
    bias: Annotated[Text, Field(max_length=MAX_NAME)] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: Annotated[bool | str, BeforeValidator(_start)] = True
    target_modules: Names | None = None
    target_parameters: PlainNames | None = None
    exclude_modules: Names | None = None
    modules_to_save: PlainNames | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=MAX_ENTRIES)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=MAX_ENTRIES)] = Field(default_factory=dict)
    trainable_token_indices: Annotated[list[int] | dict[str, list[int]], BeforeValidator(_token_rows)] | None = None
    base_model_name_or_path: Annotated[Text, Field(max_length=MAX_PATH)] = ""
    revision: Annotated[Text, Field(max_length=MAX_NAME)] = "main"
    peft_version: Annotated[Text, Field(max_length=MAX_NAME)] = ""


class Quantization(ForeignModel):
    """Of qlora.json: how the base was stored in training."""

    type: Literal["nf4", "fp4", "none"] = "nf4"
    double_quant: bool = True


class ProvenanceFile(ForeignModel):
    """Our own qlora.json, which lies in a stranger's folder too when the adapter is a stranger's."""

    base: Annotated[Text, Field(min_length=1, max_length=MAX_PATH)]
    revision: Annotated[Text, Field(max_length=MAX_NAME)]
    fingerprint: Annotated[Text, Field(max_length=MAX_NAME)] | None = None
    quantization: Quantization
    identity: BaseIdentity | None = None
    functions: Annotated[Text, Field(max_length=MAX_NAME)] | None = None
    dtype: Annotated[Text, Field(max_length=MAX_NAME)] | None = None

    def section(self) -> QuantizationSection:
        return QuantizationSection(**self.quantization.model_dump())


def read_file(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the adapter. Raises ExportError for anything else, and for a link out of it."""
    try:
        return foreign_json.load_object(files.inside(folder, name))
    except (ForeignFileError, files.UnsafePathError) as error:
        raise ExportError(_about(folder, error), _HINT) from error


def checked(model: type[foreign_json.Model], content: Mapping[str, Any], file: Path) -> foreign_json.Model:
    """A file's content as `model`; null and a missing key are the same. Raises ExportError with file, key and value."""
    try:
        return foreign_json.checked(model, {k: v for k, v in content.items() if v is not None}, str(file))
    except ForeignFileError as error:
        raise ExportError(str(error), _HINT) from error


def first_matches(patterns: Mapping[str, Number], modules: Sequence[str], where: str) -> dict[str, Number]:
    """Of the modules that a pattern fits, the value of the first one that does.

    As peft reads them (get_pattern_key): a pattern is a regular expression for the end of a name, behind a dot or
    whole. A dot in a plain name is a dot. `where` names file and key in errors. Raises ExportError for a pattern that
    cannot be matched without backtracking (look-around, references), is none, or asks for too much.
    """
    plain = {pattern: at for at, pattern in enumerate(patterns) if _PLAIN.fullmatch(pattern)}
    regexes = [pattern for pattern in patterns if pattern not in plain]
    if len(regexes) > MAX_REGEXES or sum(map(linear_regex.cost, regexes)) * len(modules) > MAX_MATCHING:
        what = f"{where}: {len(regexes):,} regular expressions for {len(modules):,} modules are too much to match"
        raise ExportError(what, "write modules' names in place of regular expressions")
    engines = {at: _engine(pattern, where) for at, pattern in enumerate(patterns) if pattern not in plain}
    values = list(patterns.values())
    found = {}
    for module in modules:
        parts = module.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        fitting = [plain[end] for end in ends if end in plain]
        before = min(fitting, default=len(values))
        first = next((at for at, engine in engines.items() if at >= before or engine.isinstance_python(module)), before)
        if (first := min(first, before)) < len(values):
            found[module] = values[first]
    return found


def _engine(pattern: str, where: str) -> SchemaValidator:
    try:
        return linear_regex.engine(rf"^(?:.*\.)?({pattern})$")
    except linear_regex.UnsafePatternError as error:
        what = f"{where}: the pattern {shown(pattern)} cannot be matched safely ({error})"
        raise ExportError(what, "write modules' names, or a pattern without look-around and references") from error


def shown(name: str) -> str:
    """A stranger's name as a message may quote it: plain ones as they are, others escaped, none of them long."""
    text = name if _PLAIN.fullmatch(name) else repr(name)
    return text if len(text) <= 200 else text[:200] + "…"


def _about(folder: Path, error: Exception) -> str:
    text = str(error)
    return text if text.startswith(str(folder)) else f"{folder}: {text}"
