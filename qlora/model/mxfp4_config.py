"""What a config.json says of experts that are published in MXFP4, as gpt-oss' are, without a tensor of them.

    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", ...]}

Names and patterns of what is not in MXFP4 mean to us what they mean to transformers (`quantizers_utils.py`,
should_convert_module): regular expressions from a name's start to the end of one of its parts, or texts that it ends
with. They are a stranger's, and are matched by an engine that does not backtrack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic_core import SchemaError, SchemaValidator, core_schema

from qlora.errors import ModelError

METHOD = "mxfp4"
# transformers reads the form into this family's modules alone (integrations/mxfp4.py, replace_with_mxfp4_linear).
MODEL_TYPES = ("gpt_oss",)
BLOCK = 32  # values along the input that share a scale
MAX_PATTERNS, MAX_LENGTH = 1_000, 200  # published ones have 4 of up to 24 characters
_CLEAN_COPY = "get a clean copy of the model from its publisher"


def is_stated(config: Any) -> bool:
    """Whether a config.json, or transformers' object of one, says that its experts are in MXFP4."""
    return _stated(config).get("quant_method") == METHOD


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether such a config.json is of a family whose MXFP4 is known."""
    return is_stated(config) and config.get("model_type") in MODEL_TYPES


def refuse(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError where such a config.json has widths that blocks do not fit in, or names modules by what cannot
    be matched."""
    for key in ("hidden_size", "intermediate_size"):
        if isinstance(width := config.get(key), int) and width % BLOCK:
            what = f"{where}: config.json: {key} is {width}, but values of MXFP4 share a scale by {BLOCK}"
            raise ModelError(what, _CLEAN_COPY)
    names = _stated(config).get("modules_to_not_convert")
    few = names is None or (isinstance(names, list) and len(names) <= MAX_PATTERNS)
    if not few or any(not isinstance(name, str) or len(name) > MAX_LENGTH for name in names or ()):
        what = f"{where}: config.json: modules_to_not_convert is no list of names"
        raise ModelError(what, _CLEAN_COPY)
    for name in names or ():
        if _engine(name) is None:
            what = f"{where}: config.json: modules_to_not_convert: {name!r} is no pattern that can be matched safely"
            raise ModelError(what, _CLEAN_COPY)


def holds(config: Any, module: str) -> bool:
    """Whether the experts in `module` ("model.layers.0.mlp.experts") are in MXFP4, by what the configuration says."""
    stated = _stated(config)
    if stated.get("quant_method") != METHOD:
        return False
    names: Sequence[str] = stated.get("modules_to_not_convert") or ()
    return not any(module.endswith(name) or _begins(name, module) for name in names)


def _stated(config: Any) -> Mapping[str, Any]:
    """The quantization that a configuration states."""
    found = config if isinstance(config, Mapping) else vars(config)
    stated = found.get("quantization_config")
    return stated if isinstance(stated, Mapping) else {}


def _begins(pattern: str, module: str) -> bool:
    """Whether a pattern fits a module's name up to the end of one of its parts."""
    engine = _engine(pattern)
    return engine is not None and any(engine.isinstance_python(part) for part in _beginnings(module))


def _beginnings(module: str) -> Iterator[str]:
    yield module
    for at, sign in enumerate(module):
        if sign == ".":
            yield module[:at]
            yield module[: at + 1]


@lru_cache(MAX_PATTERNS)
def _engine(pattern: str) -> SchemaValidator | None:
    """What matches a whole name; None where the pattern is none, or would need look-around or references."""
    schema = core_schema.str_schema(pattern=f"^(?:{pattern})$", regex_engine="rust-regex")
    try:
        return SchemaValidator(schema)
    except SchemaError:
        return None
