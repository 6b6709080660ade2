"""Tiny gpt-oss bases whose experts are in MXFP4 as the published ones are, packed by an encoder of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import split_into_shards
from tests.mixtures import make_base as make_plain

WEIGHTS = "model.safetensors"
# As openai/gpt-oss-20b has it.
STATED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PROJECTIONS = ("gate_up_proj", "down_proj")


def encode(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(E, out, in) to `_blocks` (E, out, in / 32, 16) and `_scales` (E, out, in / 32): section 6.3 of the
    specification, the shared exponent from the largest magnitude, each value to the nearest code."""
    blocks = weights.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(dim=-1)
    exponents = torch.where(largest > 0, largest.log2().floor() - 2, torch.full_like(largest, -127)).clamp(-127, 125)
    scaled = blocks / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(dim=-1) + 8 * torch.signbit(scaled)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8), (exponents + 127).to(torch.uint8)


def make_base(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    overrides: Mapping[str, Any] | None = None,
    plain_layers: tuple[int, ...] = (),
) -> Path:
    """A tiny random gpt-oss; the experts of `plain_layers` are left in bf16, and config.json says so."""
    make_plain("gpt_oss", folder, seed=seed, overrides=overrides)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        if int(name.split(".")[2]) not in plain_layers:
            blocks, scales = encode(tensors.pop(name).transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    names = [*STATED["modules_to_not_convert"], *(f"model.layers.{layer}.mlp.experts" for layer in plain_layers)]
    state(folder, {**STATED, "modules_to_not_convert": names})
    if shards > 1:
        split_into_shards(folder, shards)
    return folder


def state(folder: Path, stated: Mapping[str, Any] | None) -> None:
    """Have config.json state this quantization, or none."""
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "quantization_config"}
    file.write_text(json.dumps(config if stated is None else {**config, "quantization_config": stated}, indent=2))
