"""What published mixtures take, by their configuration alone: weights held in 4 bit, and what fits on a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.memory.baselines import BASELINES
from qlora.memory.simulate import Simulator, _experts_of
from qlora.memory.simulation import ModelSpec, Workload
from qlora.model.emptied import _block_constants
from qlora.model.experts import projections
from qlora.model.made_up import load_nothing
from qlora.model.meta_model import build_unmatched
from qlora.model.weight_receiving import Place
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.experts import IN_CHUNKS, IN_TRITON, Routing
from qlora.step.kernels import trial
from tests import mixtures
from tests.memory.mixture_shapes import PUBLISHED, QWEN3, config_of
from tests.sampling import sampled

GIB = 2**30
# Of a card with 24 GB, what its driver leaves.
RESIDENT = {"Qwen3-30B-A3B": 23.5, "Qwen3.6-35B-A3B": 23.5, "gpt-oss-20b": 23.5, "GLM-4.7-Flash": 23.5}
# Slots and head, and nothing else of the base: GiB on the device while it is loaded, and of tensors of a step of 2,048
# tokens, inputs of layers on it.
STREAMED = {
    "Qwen3-30B-A3B": (1.3, 2.3),
    "Qwen3.6-35B-A3B": (2.0, 3.6),
    "gpt-oss-20b": (2.0, 4.5),
    "GLM-4.7-Flash": (1.5, 3.0),
    "Gemma 4 26B-A4B": (2.4, 4.1),
}


def held(model: Any) -> Iterator[Tensor]:
    seen = set()
    for tensor in (*model.parameters(), *model.buffers(), *_block_constants(model)):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


NAME = "Qwen3-30B-A3B"
QUICK = ("gpt-oss-20b", "Gemma 4 26B-A4B")


@pytest.mark.parametrize("name", sampled(PUBLISHED, *QUICK))
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


@pytest.mark.parametrize("name", sampled(STREAMED, "Qwen3-30B-A3B"))
def test_streamed_no_more_than_slots_and_head_are_on_the_card(name: str) -> None:
    """While it is loaded too: the experts of a layer are on the host before the next layer's come."""
    place = Place(streams=True, host_embedding=True)
    spec = ModelSpec(config_of(name), name, LoraSection(), QuantizationSection(), target="cuda", place=place)
    simulator = Simulator(spec)
    simulation = simulator.run(Workload(1, 2048))
    loaded, highest = STREAMED[name]
    assert simulation.phases["load"].total < loaded * GIB
    assert max(peak.total for peak in simulation.phases.values()) < highest * GIB
    assert simulator.drawn.host_bytes > 0.9 * (PUBLISHED[name][2] - 3) * GIB
    tables = simulator.drawn.table_bytes
    assert simulator.drawn.stacked_bytes > 0.85 * (simulator.drawn.host_bytes - tables)


@pytest.mark.parametrize("by", [IN_TRITON, IN_CHUNKS])
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_by_the_kernel_no_number_of_the_device_is_read(by: str, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows of experts end is asked of a card by chunks of experts alone."""
    bounds, asked = Routing.__dict__["bounds"], list[bool]()
    even = bounds.func
    monkeypatch.setattr(bounds, "func", lambda routing: (asked.append(routing.ends_E.is_meta), even(routing))[1])
    config = mixtures.make_config("qwen3_moe", {"hidden_size": 128, "moe_intermediate_size": 128})
    section, place = QuantizationSection(), Place(streams, streams)
    spec = ModelSpec(config, "small", LoraSection(r=4), section, target="cuda", place=place, experts=by)
    simulator = Simulator(spec)
    assert simulator.drawn.stacked_bytes
    asked.clear()  # when it was built, the use of its layers was looked at, plain experts in them
    simulation = simulator.run(Workload(1, 64, evaluates=False))
    assert any(asked) is (by == IN_CHUNKS)
    assert simulation.work is not None and any(operation.experts for operation, _ in simulation.work.micro_batch)


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


def test_an_estimate_takes_the_form_that_a_run_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 4 bit the kernel where Triton is; in fp16 a card may be too old for it."""
    monkeypatch.setattr(trial, "expected", lambda: True)
    spec = ModelSpec(None, "qwen3", LoraSection(), QuantizationSection())
    assert _experts_of(spec) == IN_TRITON
    others = (
        {"dtype": torch.float16},
        {"target": "cpu"},
        {"experts": IN_CHUNKS},
        {"baseline": next(one for name, one in BASELINES.items() if name != "qlora")},
    )
    assert [_experts_of(replace(spec, **changed)) for changed in others] == [IN_CHUNKS] * 4
    monkeypatch.setattr(trial, "expected", lambda: False)
    assert _experts_of(spec) == IN_CHUNKS


@pytest.mark.slow
def test_adapters_on_experts_of_qwen3_30b_take_what_was_counted() -> None:
    """629 million values at rank 16: 12 bytes each with masters, gradients and 8-bit moments. Beside them nothing but
    what is as narrow as the rank is kept, and a step of rank 4 is next to one without."""
    peaks = {}
    for rank in (4, 16):
        lora = LoraSection(r=rank, experts=True)
        simulator = Simulator(ModelSpec(config_of(NAME), NAME, lora, QuantizationSection(), target="cuda"))
        simulation = simulator.run(Workload(1, 2048))
        peaks[rank] = max(simulation.phases.values(), key=lambda peak: peak.total)
        assert simulator.drawn.values.adapter / 1e6 == pytest.approx((629.1 + 13.4) * rank / 16, abs=0.1)
    parts = peaks[16].parts
    of_training = sum(parts[name] for name in ("adapters", "gradients", "optimizer"))
    assert of_training == pytest.approx(12 * 642.5e6, rel=0.01)
    assert peaks[4].total < 18.3 * GIB and peaks[16].total < 23.7 * GIB
    assert abs(parts["activations"] - peaks[4].parts["activations"]) < 0.1 * GIB
