"""A stranger's config.json, reduced to what the model it names can read.

transformers sets every key of a configuration as an attribute, whatever its name; keys have chosen code that way (see
`base_folder.FORBIDDEN_KEYS`). Known are the names that the model's own source and transformers' common code use, as
identifiers or as texts: a key that neither uses can change nothing but what an attacker is after, so dropping it is
safe, and older names that are only read for compatibility (`rope_theta`, `pretraining_tp`) stay.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
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
    """Identifiers, attributes, arguments and texts that stand alone; comments and docstrings are neither."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)
        found = (getattr(node, part, None) for part in ("id", "attr", "arg"))
        names.update(name for name in found if isinstance(name, str))
    return frozenset(names)
