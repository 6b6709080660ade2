"""What transformers 5 alone reads, said once more so that version 4 and the tools built on it read the same.

A base that version 5 has saved holds its rotary positions as `rope_parameters` only: version 4.57 then takes theta
10,000 and no scaling, without a word, and is another model (logits off by 3 to 5 on five tiny ones). Its tokenizer is
of a class that version 4 does not know. The old keys are added and the new ones stay: both versions then read the same.
What the hub's bases hold, saved by version 4, is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of rope_parameters, what version 4 does not look for in rope_scaling.
_ELSEWHERE = ("rope_theta", "partial_rotary_factor")


def config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with `rope_theta` and `rope_scaling` beside `rope_parameters`, where these are missing."""
    said = config.get("rope_parameters")
    if not isinstance(said, Mapping) or "rope_theta" in config:
        return dict(config)
    old: dict[str, Any] = {}
    whole = said
    if isinstance(said.get("full_attention"), Mapping):  # Gemma 3: sliding layers have a theta of their own
        whole = said["full_attention"]
        local = said.get("sliding_attention")
        if isinstance(local, Mapping) and "rope_theta" in local:
            old["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" not in whole:
        return dict(config)
    old["rope_theta"] = whole["rope_theta"]
    if "partial_rotary_factor" in whole:
        old["partial_rotary_factor"] = whole["partial_rotary_factor"]
    old["rope_scaling"] = _scaling(whole)
    return {**config, **{key: value for key, value in old.items() if key not in config}}


def _scaling(said: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = said.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "longrope":  # Phi-3's configuration in version 4 takes these three keys and no other
        return {"type": kind, "short_factor": said["short_factor"], "long_factor": said["long_factor"]}
    return {key: value for key, value in said.items() if key not in _ELSEWHERE}


def tokenizer_config_for_both(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class and a key for further special tokens that version 4 knows too."""
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = changed.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 takes a mapping under this name
        changed.setdefault("additional_special_tokens", extra)
        del changed["extra_special_tokens"]
    return changed
