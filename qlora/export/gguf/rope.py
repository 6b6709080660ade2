"""Rotary positions as llama.cpp reads them: keys, and tensors for what keys cannot express.

What transformers computes and what llama.cpp will compute from these keys are compared before anything is
written: a base whose positions would turn otherwise is refused. (Both read the same configuration in their own way,
and a wrong reading shows only as a model that answers worse the longer the text is.)

    none      f_i = base^(-2i/d)
    linear    f_i / factor                               Chen et al. 2023 (position interpolation)
    llama3    f_i / t_i, t in a tensor `rope_freqs`      Llama 3.1; the slow frequencies are stretched, the fast are not
    yarn      a ramp between f_i and f_i / factor        Peng et al. 2023, section 3.2
    longrope  f_i / t_i, two tensors, for short and long texts, and a factor on attention   Ding et al. 2024
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora.errors import ExportError

Key = tuple[str, Any]
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # YaRN section 3.2, the defaults of transformers and of llama.cpp
SAME_FREQUENCY = 1e-4  # relative; the two differ by 1e-6 through fp32 powers, by 1e-2 and more when read wrongly


@dataclass(frozen=True)
class ReferenceRope:
    """What the model itself computes with: its frequencies (pairs of dims,) and its factor on attention."""

    frequencies: NDArray[np.float64]
    attention: float


def reference_ropes(model: Any) -> dict[str, ReferenceRope]:
    """The rotary embedding of a transformers model by layer type, "" where all layers share one."""
    found = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if name.endswith("inv_freq") and "original" not in name:
                kind = name.removesuffix("inv_freq").rstrip("_")
                factor = getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling", None)
                found[kind] = ReferenceRope(buffer.double().numpy(), 1.0 if factor is None else float(factor))
    return found


@dataclass(frozen=True)
class Rope:
    """`keys` follow the architecture's prefix ("rope.freq_base"); `tensors` are float32, one value a pair of dims."""

    keys: tuple[Key, ...]
    tensors: Mapping[str, NDArray[np.float32]]


def describe(
    config: Any, rotated_dims: int, model: Mapping[str, ReferenceRope], takes_factors: Collection[str]
) -> Rope:
    """Keys and tensors for the rotary embedding of a text model's `config` (transformers 5's `rope_parameters`).

    `model` is what the model itself computes with, `takes_factors` the kinds whose factors the architecture reads as
    tensors.
    Raises ExportError for what llama.cpp cannot express.
    """
    sections = config.rope_parameters
    if "full_attention" not in sections:
        return _one(config, sections, rotated_dims, model[""], takes_factors)
    whole = _one(config, sections["full_attention"], rotated_dims, model["full_attention"], takes_factors)
    local = sections.get("sliding_attention")
    if not local:
        return whole
    if local.get("rope_type", "default") != "default":
        raise refused(f"sliding layers with {local['rope_type']!r} positions")
    base = number(local, "rope_theta")
    compare(frequencies(base, rotated_dims), 1.0, model["sliding_attention"])
    return Rope((*whole.keys, ("rope.freq_base_swa", base)), whole.tensors)


def plain(base: float, dims: int, own: ReferenceRope) -> Rope:
    """Positions that turn `dims` from `base` and nothing else."""
    compare(frequencies(base, dims), 1.0, own)
    return Rope((("rope.freq_base", base),), {})


def rounded_yarn(config: Any, dims: int, model: Mapping[str, ReferenceRope]) -> Rope:
    """yarn positions whose ramp the model does not round, as near as llama.cpp comes to them, which does.

    The ramp alone may differ: what is not on it must be the model's own.
    """
    rope, own = {**config.rope_parameters, "truncate": True}, model[""]
    base = number(rope, "rope_theta")
    keys, scaled, attention = _yarn(config, rope, frequencies(base, dims))
    outside = np.isclose(scaled, frequencies(base, dims)) | np.isclose(
        scaled * number(rope, "factor"), frequencies(base, dims)
    )
    if own.frequencies.shape != scaled.shape:
        raise refused("these rotary positions: it would turn by other angles than the model")
    same = np.where(outside, own.frequencies, scaled)
    compare(scaled, attention, ReferenceRope(same, own.attention))
    return Rope((("rope.freq_base", base), *keys), {})


def _one(config: Any, rope: Mapping[str, Any], dims: int, own: ReferenceRope, takes_factors: Collection[str]) -> Rope:
    kind = str(rope.get("rope_type", "default"))
    base = number(rope, "rope_theta")
    scaled = plain = frequencies(base, dims)
    attention = 1.0
    keys: list[Key] = []
    tensors: dict[str, NDArray[np.float32]] = {}
    if kind == "linear":
        factor = number(rope, "factor")
        keys = [("rope.scaling.type", "linear"), ("rope.scaling.factor", factor)]
        scaled = plain / factor
    elif kind == "yarn":
        keys, scaled, attention = _yarn(config, rope, plain)
    elif kind in ("llama3", "longrope") and kind not in takes_factors:
        raise refused(f"{kind!r} positions in this architecture")
    elif kind == "llama3":
        factors = _llama3_factors(rope, plain)
        tensors = {"rope_freqs.weight": factors.astype(np.float32)}
        scaled = plain / factors
    elif kind == "longrope":
        keys, tensors = _longrope(config, rope, dims)
        scaled, attention = plain / tensors["rope_factors_short.weight"], dict(keys)["rope.scaling.attn_factor"]
    elif kind != "default":
        raise refused(f"{kind!r} positions")
    compare(scaled, attention, own)
    return Rope((("rope.freq_base", base), *keys), tensors)


def number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 from the rotary positions of a configuration. Raises ExportError for anything else."""
    value: Any = rope.get(key) or default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        what = f"config.json: {key} of the rotary positions is no number above 0 (it is {str(rope.get(key))[:60]!r})"
        raise ExportError(what, "get a clean copy of the base")
    return float(value)


def frequencies(base: float, dims: int) -> NDArray[np.float64]:
    """Turns a token for each pair of dims, before any scaling (Su et al. 2021, section 3.2.2)."""
    return base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def _llama3_factors(rope: Mapping[str, Any], plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each frequency is slowed: not at all for short waves, by `factor` for long ones, a ramp between."""
    factor, low, high = (number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = number(rope, "original_max_position_embeddings")
    waves = 2 * math.pi / plain
    ramp = np.clip((trained / waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - ramp) / factor + ramp)  # type: ignore[no-any-return]


def _yarn(
    config: Any, rope: Mapping[str, Any], plain: NDArray[np.float64]
) -> tuple[list[Key], NDArray[np.float64], float]:
    factor, base = number(rope, "factor"), number(rope, "rope_theta")
    trained = int(number(rope, "original_max_position_embeddings", config.max_position_embeddings))
    fast, slow = number(rope, "beta_fast", YARN_BETA_FAST), number(rope, "beta_slow", YARN_BETA_SLOW)
    if rope.get("truncate") is False:
        raise refused("yarn positions whose ramp is not rounded (truncate = false)")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # YaRN section 3.4
    keys: list[Key] = [
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", factor),
        ("rope.scaling.original_context_length", trained),
        ("rope.scaling.yarn_beta_fast", fast),
        ("rope.scaling.yarn_beta_slow", slow),
    ]
    # llama.cpp always applies the usual factor on attention; another one is given as a multiple of it.
    wanted = _yarn_attention(rope, factor, usual)
    if wanted != usual:
        keys.append(("rope.scaling.attn_factor", wanted / usual))
    dims = 2 * plain.size

    def at(turns: float) -> float:  # the dim that turns so often within the trained length
        return dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0.0, math.floor(at(fast))), min(dims - 1.0, math.ceil(at(slow)))
    ramp = np.clip((np.arange(plain.size) - low) / max(0.001, high - low), 0.0, 1.0)
    return keys, plain / factor * ramp + plain * (1.0 - ramp), wanted


def _yarn_attention(rope: Mapping[str, Any], factor: float, usual: float) -> float:
    """The factor on attention that transformers applies: given outright, or by DeepSeek's two mscales, or the usual."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and of_all:
        mscale, of_all = number(rope, "mscale"), number(rope, "mscale_all_dim")
        return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * of_all * math.log(factor) + 1.0)
    return usual


def _longrope(config: Any, rope: Mapping[str, Any], dims: int) -> tuple[list[Key], dict[str, NDArray[np.float32]]]:
    trained = int(number(rope, "original_max_position_embeddings"))
    stretch = config.max_position_embeddings / trained
    attention = rope.get("attention_factor")
    if attention is None:  # LongRoPE as Phi-3 uses it; transformers, _compute_longrope_parameters
        attention = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    else:
        attention = number(rope, "attention_factor")
    tensors = {}
    for name in ("long", "short"):
        factors: Any = rope.get(f"{name}_factor")
        if not isinstance(factors, list) or not all(type(value) in (int, float) for value in factors):
            raise refused(f"positions whose {name}_factor is no list of numbers")
        if len(factors) != dims // 2:
            raise refused(f"{len(factors)} {name} factors for {dims // 2} pairs of dims")
        tensors[f"rope_factors_{name}.weight"] = np.asarray(factors, dtype=np.float32)
    keys: list[Key] = [
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.original_context_length", trained),
        ("rope.scaling.attn_factor", attention),
    ]
    return keys, tensors


def compare(frequencies: NDArray[np.float64], attention: float, own: ReferenceRope) -> None:
    """What llama.cpp will compute with against what the model does. Raises ExportError when they differ."""
    computed = own.frequencies
    if computed.shape != frequencies.shape or not np.allclose(computed, frequencies, rtol=SAME_FREQUENCY, atol=0.0):
        raise refused("these rotary positions: it would turn by other angles than the model")
    if not math.isclose(own.attention, attention, rel_tol=SAME_FREQUENCY):
        wanted = own.attention
        raise refused(f"these rotary positions: it would scale attention by {attention:.4f}, not by {wanted:.4f}")


def refused(what: str) -> ExportError:
    """The error for a setting that llama.cpp does not have."""
    return ExportError(f"llama.cpp cannot express {what}", "export with to='hf', and run it with transformers or vLLM")
