"""A stranger's config.json, reduced to what the model it names can read.

transformers sets every key of a configuration as an attribute, whatever its name; keys have chosen code that way (see
`base_folder.FORBIDDEN_KEYS`). Known are the names that the model's own source and transformers' common code use, as
identifiers or as texts: a key that neither uses can change nothing but what an attacker is after, so dropping it is
safe, and older names that are only read for compatibility (`rope_theta`, `pretraining_tp`) stay.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import Any

from qlora.model.config_bounds import LABELS, RETURNED

# How attention and experts are computed is the recipe's choice, not the file's.
OURS_TO_CHOOSE = ("attn_implementation", "_attn_implementation", "_attn_implementation_autoset")
NEVER_READ = (*OURS_TO_CHOOSE, "experts_implementation", "auto_map")
# transformers' common code that reads configurations.
_COMMON = ("configuration_utils", "modeling_rope_utils", "modeling_utils", "cache_utils", "masking_utils")
_PARTS = ("text_config", "vision_config", "audio_config")


@dataclass(frozen=True)
class KnownConfig:
    """`values` are what transformers is given, `dropped` the keys left out (`text_config.x` for one of a part)."""

    values: Mapping[str, Any]
    dropped: tuple[str, ...]


def reduce_config(config: Mapping[str, Any]) -> KnownConfig:
    """What the model of this configuration can read. A model type that transformers lacks keeps nothing unknown."""
    names = _names(str(config.get("model_type")))
    values: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in config.items():
        if key in NEVER_READ or key not in names:
            dropped.append(key)
        elif key in (*LABELS, *RETURNED):
            continue  # many old configurations have them, and no causal model needs them: nothing to tell
        elif key in _PARTS and isinstance(value, dict):
            part = reduce_config(value if "model_type" in value else {**value, "model_type": config.get("model_type")})
            values[key] = {name: part.values[name] for name in part.values if name in value}
            dropped += [f"{key}.{name}" for name in part.dropped]
        else:
            values[key] = value
    return KnownConfig(values, tuple(sorted(dropped)))


def open_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object, made of the known keys alone.

    Through a folder, since its rules for old files (a Mistral that is a Ministral) are applied to files only.
    """
    from transformers import AutoConfig

    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(reduce_config(config).values), encoding="utf-8")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def content_key(config: Any) -> str:
    """transformers' `config` as text: the same for two that say the same of a model, wherever they were opened."""
    values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    return json.dumps(values, sort_keys=True, default=str)


def with_layers(text: Any, layers: int) -> Any:
    """The configuration with its first `layers` layers; lists with an entry a layer are cut as well."""
    shorter = copy.deepcopy(text)
    for key, value in list(vars(shorter).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(shorter, key, value[:layers])
    shorter.num_hidden_layers = layers
    return shorter


@lru_cache(16)
def _names(model_type: str) -> frozenset[str]:
    """Every name used by the source of a model type's folder, of the classes it builds on, and of the common code."""
    import transformers
    from transformers import CONFIG_MAPPING

    root = Path(transformers.__file__).parent
    files = {root / f"{name}.py" for name in _COMMON}
    if model_type in CONFIG_MAPPING:
        for kind in CONFIG_MAPPING[model_type].__mro__:
            if kind.__module__.startswith("transformers.models."):
                files.update(Path(inspect.getfile(kind)).parent.glob("*.py"))
    return frozenset().union(*(_names_of(file) for file in files if file.is_file()))


@lru_cache(256)
def _names_of(file: Path) -> frozenset[str]:
    """Identifiers, attributes, arguments and texts that stand alone; comments are none of them.

    Of the compiled source, in which the interpreter has them listed: a walk over its syntax tree takes 30 times as
    long, a fifth of a first estimate. What a class calls its own methods is no name that is read.
    """
    names: set[str] = set()
    todo = [(compile(file.read_text(encoding="utf-8"), file.name, "exec", dont_inherit=True), False)]
    while todo:
        code, in_class = todo.pop()
        inner, texts = _constants(code)
        own = {one.co_name for one in inner} if in_class else set()
        names |= {*code.co_names} - own
        names.update(text for text in (*code.co_varnames, *code.co_freevars, *code.co_cellvars, *texts))
        todo += [(one, _is_class(one)) for one in inner]
    return frozenset(name for name in names if name.isidentifier())


def _constants(code: CodeType) -> tuple[list[CodeType], list[str]]:
    """What is defined inside, and texts, those of tuples and sets of texts as well."""
    inner, texts, todo = [], [], list(code.co_consts)
    while todo:
        constant = todo.pop()
        if isinstance(constant, CodeType):
            inner.append(constant)
        elif isinstance(constant, str):
            texts.append(constant)
        elif isinstance(constant, (tuple, frozenset)):
            todo.extend(constant)
    return inner, texts


def _is_class(code: CodeType) -> bool:
    """A class' body begins by naming its module."""
    return "__qualname__" in code.co_names and "__module__" in code.co_names
