"""What published mixtures take, by their configuration alone: weights held in 4 bit, and what fits on a card.

The sizes of the first, third and last are their published ones; the others are transformers' own defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.model.emptied import _block_constants
from qlora.model.experts import projections
from qlora.model.made_up import load_nothing
from qlora.model.meta_model import build_unmatched
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.experts import IN_CHUNKS, IN_TRITON

GIB = 2**30
QWEN3 = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA4 = {
    "hidden_size": 2816,
    "num_hidden_layers": 30,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 5,
}
# Family, sizes, GiB of all weights held in 4 bit (embeddings, head and routers in 16), thousands of millions of values.
PUBLISHED = {
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3, 15.55, 30.5),
    "Qwen3.6-35B-A3B": ("qwen3_5_moe_text", {}, 18.09, 34.7),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 11.66, 20.9),
    "GLM-4.7-Flash": ("glm4_moe_lite", {}, 15.27, 29.9),
    "Gemma 4 26B-A4B": ("gemma4_text", GEMMA4, 13.16, 25.2),
}
# Of a card with 24 GB, what its driver leaves; of 16 GB.
RESIDENT = {"Qwen3-30B-A3B": 23.5, "Qwen3.6-35B-A3B": 23.5, "GLM-4.7-Flash": 23.5}


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    family, sizes, _, _ = PUBLISHED[name]
    return CONFIG_MAPPING[family](**sizes)


def held(model: Any) -> Iterator[Tensor]:
    seen = set()
    for tensor in (*model.parameters(), *model.buffers(), *_block_constants(model)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


QUICK = ("gpt-oss-20b", "Gemma 4 26B-A4B")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name not in QUICK)]
)
def test_weights_take_what_was_counted(name: str) -> None:
    """Without a byte of them: the model as loading would leave it, on meta."""
    _, _, gib, billions = PUBLISHED[name]
    model = build_unmatched(config_of(name), "eager", name)
    model.tie_weights()
    assert sum(one.numel() for one in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.1)
    values = sum(getattr(module, leaf).numel() for _, module, leaf in projections(model))
    load_nothing(model, QuantizationSection())
    assert sum(tensor.nbytes for tensor in held(model)) / GIB == pytest.approx(gib, abs=0.15)
    slabs = [getattr(module, leaf) for _, module, leaf in projections(model)]
    assert 8 * sum(slab.nbytes for slab in slabs) / values == pytest.approx(4.127, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDENT)
def test_a_step_of_2048_tokens_fits_on_24_gb(name: str) -> None:
    """Attention adapters of rank 16, every layer recomputed."""
    spec = ModelSpec(config_of(name), name, LoraSection(), QuantizationSection(), target="cuda")
    simulation = Simulator(spec).run(Workload(1, 2048))
    highest = max(peak.total for peak in simulation.phases.values())
    assert PUBLISHED[name][2] * GIB < highest < RESIDENT[name] * GIB - GIB  # context and what the allocator rounds


@pytest.mark.slow
def test_by_the_kernel_a_step_has_no_weights_in_16_bit() -> None:
    """Of a layer of Qwen3-30B at 2,048 tokens, 252 MiB of them at a time. On the way back other tensors are the peak:
    143 MiB less; at 8,192 tokens rows are, and nothing is."""
    from transformers import CONFIG_MAPPING

    text = CONFIG_MAPPING["qwen3_moe"](**{**QWEN3, "num_hidden_layers": 4, "vocab_size": 512})
    peaks = {}
    for by in (IN_CHUNKS, IN_TRITON):
        spec = ModelSpec(text, "qwen3", LoraSection(), QuantizationSection(), target="cuda", experts=by)
        phases = Simulator(spec).run(Workload(1, 2048, evaluates=False)).phases
        highest = max(peak.total for peak in phases.values())
        peaks[by] = [number / 2**20 for number in (phases["forward"].total, highest)]
    forward, highest = (one - other for one, other in zip(peaks[IN_CHUNKS], peaks[IN_TRITON], strict=True))
    assert 230 < forward < 252 and 120 < highest < 252
