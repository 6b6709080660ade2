"""Weights of a loaded model that go to the host: the same numbers, and no more of them on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import device as hardware
from qlora import numerics
from qlora.events import Recorder, Sinks
from qlora.memory.simulation import Workload
from qlora.model import adapters, load, weight_streaming
from qlora.model.emptied import empty
from qlora.model.resolve import resolve
from qlora.model.weight_moving import movable, move
from qlora.model.weight_receiving import Place, bytes_on_device, tables
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection, MemorySection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.card import Card, rehearsal
from tests.families import make_base
from tests.memory.counted import real_batch

CPU, BOTH = torch.device("cpu"), Place(True, True)


def tuned(folder: Path, lora: LoraSection = LoraSection(r=4), family: str = "llama", **overrides: Any) -> Any:
    base = make_base(family, folder, overrides={"num_hidden_layers": 3, "layer_types": None, **overrides})
    settings = (QuantizationSection(), "auto", CPU, Sinks())
    return adapters.attach(load.load_base(resolve(str(base), "main", Sinks()), *settings, place=Place()), lora, 0)


def step(model: Any) -> list[Tensor]:
    """Loss and gradients of a micro-batch."""
    causal_lm = model.get_base_model().train()
    model.zero_grad()
    set_gradient_checkpointing(causal_lm, True, False)
    torch.manual_seed(3)
    batch = real_batch(Workload(2, 40), causal_lm.config.get_text_config().vocab_size)
    loss = forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0)
    return [loss, *(one.grad.clone() for one in adapters.trainable(model).values())]


@pytest.mark.parametrize("lora", [LoraSection(r=4), LoraSection(r=4, dropout=0.1), LoraSection(r=4, use_dora=True)])
def test_a_model_computes_what_it_did(lora: LoraSection, tmp_path: Path) -> None:
    model, recorder = tuned(tmp_path, lora), Recorder()
    # `A` alone has a gradient of zero before the first update.
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    causal_lm, wanted = model.get_base_model(), step(model)
    held = bytes_on_device(causal_lm, causal_lm.parameters())
    for place in (Place(host_embedding=True), BOTH, BOTH):
        move(causal_lm, place, CPU, recorder)
        assert all(map(torch.equal, step(model), wanted))
    streamed = weight_streaming.inside(causal_lm)
    assert streamed is not None and streamed.ring.sent and len(tables(causal_lm)) == 1
    assert len(recorder.of("notice")) == 2, "each is said once"
    assert bytes_on_device(causal_lm, causal_lm.parameters()) < held
    empty(model)
    assert streamed.store.host_bytes == 0


def test_what_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, what a recipe leaves open and a model has: not what is trained, tied, compiled, there, or too much."""
    model = tuned(tmp_path / "plain").get_base_model()
    assert movable(model, MemorySection(), CPU) == Place()
    with rehearsal(monkeypatch, Card()):
        assert movable(model, MemorySection(), CPU) == BOTH
        assert movable(model, MemorySection(stream_weights=False), CPU) == Place(host_embedding=True)
        assert movable(model, MemorySection(embedding="device"), CPU) == Place(streams=True)
        with numerics.in_force(Numerics(compiled=True)):
            assert movable(model, MemorySection(), CPU) == Place(host_embedding=True)
        with monkeypatch.context() as patch:
            patch.setattr(hardware, "available_ram", lambda: 1000)
            assert movable(model, MemorySection(), CPU) == Place(host_embedding=True)
        tied = tuned(tmp_path / "tied", tie_word_embeddings=True).get_base_model()
        assert movable(tied, MemorySection(), CPU) == Place(streams=True)
        move(tied, BOTH, CPU, Sinks())
        assert weight_streaming.inside(tied) is not None and tables(tied) == []
        whole = tuned(tmp_path / "whole", LoraSection(r=4, modules_to_save=("embed_tokens",))).get_base_model()
        assert movable(whole, MemorySection(), CPU) == Place(streams=True)
        move(model, BOTH, CPU, Sinks())
        assert movable(model, MemorySection(), CPU) == Place()
