"""On a GPU: streamed layers give the bits of resident ones, and their copies are hidden behind what is computed.

`pytest tests/gpu/test_streaming.py`, alone on the machine; the second test prints its figures with `-s`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import device as hardware
from qlora.device import current, is_card
from qlora.events import Sinks
from qlora.memory.simulation import Workload
from qlora.model import adapters, load
from qlora.model.resolve import resolve
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import Ring, inside
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.families import make_base
from tests.memory.counted import real_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_card(current()), reason="needs a CUDA GPU"),
]
# 12 layers of 33 MB in 4 bit: 2.8 ms a copy at 12 GB/s, less than any card computes a layer of 4,096 tokens in.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "layer_types": None,
}
STALL_SHARE = 0.15  # of a step: the issue asks for 85 % of the resident speed


def trained(base: Path, place: Place) -> Any:
    found = resolve(str(base), "main", Sinks())
    model = load.load_base(found, QuantizationSection(), "auto", current(), Sinks(), place)
    tuned = adapters.attach(model, LoraSection(r=16), 0, functions="qlora")
    with torch.no_grad():
        for number, parameter in enumerate(adapters.trainable(tuned).values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_((0.02 * drawn).to(parameter))
    set_gradient_checkpointing(tuned.get_base_model(), True, keep_random_state=False)
    return tuned.train()


def step(model: Any, tokens: int) -> dict[str, torch.Tensor]:
    causal_lm = model.get_base_model()
    model.zero_grad()
    batch = real_batch(Workload(1, tokens), causal_lm.config.vocab_size).to(current())
    forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), float(tokens))
    return {name: parameter.grad.clone() for name, parameter in adapters.trainable(model).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("base"), overrides=SHAPE)


def test_the_bits_of_resident_layers_from_poisoned_slots(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is filled with 0xFF behind its layer, on the computing stream: a copy that did not wait would be undone, a
    layer that did not wait would compute with it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        wanted = step(trained(base, Place()), 2048)
        hardware.release(current())
        let_go = Ring.let_go

        def poisoned(ring: Ring, layer: int) -> None:
            slot = ring._slot_of(layer)
            assert slot is not None
            slot.blob.fill_(0xFF)
            let_go(ring, layer)
            slot.layer = None

        monkeypatch.setattr(Ring, "let_go", poisoned)
        model = trained(base, Place(streams=True, host_embedding=True))
        for _ in range(3):
            found = step(model, 2048)
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_copies_are_hidden(base: Path) -> None:
    seconds = {}
    for place in (Place(), Place(streams=True)):
        model = trained(base, place)
        for _ in range(2):
            step(model, 4096)
        hardware.synchronize(current())
        began = time.monotonic()
        for _ in range(5):
            step(model, 4096)
        hardware.synchronize(current())
        seconds[place.streams] = (time.monotonic() - began) / 5
        if (held := inside(model)) is not None:
            print(f"\n{held.ring.sent} blobs of {held.ring.nbytes / 1e6:.1f} MB")
            assert hardware.peak_bytes(current()) is not None
        del model
        hardware.release(current())
    print({"resident": seconds[False], "streamed": seconds[True]})
    assert seconds[True] <= seconds[False] * (1 + STALL_SHARE)
