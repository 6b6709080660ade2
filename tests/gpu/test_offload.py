"""On a GPU: inputs on the host change no bit, take no device memory, and cost less than 2 % of a step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import device
from qlora.batch import Batch
from qlora.layer_partners import ON_DEVICE, Inputs
from qlora.memory.simulation import Workload
from qlora.model import adapters
from qlora.step import offload
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import recomputable, set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from qlora.step.offload import OnHost, Pool
from tests.families import make_base
from tests.memory.counted import real_batch
from tests.step.opened import opened

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_card(device.current()), reason="needs a CUDA GPU"),
]
LAYERS, LENGTH = 12, 4096
# Wide enough for products to be what takes the time: 45 million values in twelve layers.
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "layer_types": None}
MOST_STALL = 0.02  # of a step


class Poisoned(Pool):
    """What comes back holds no number any more, as soon as the copy that read it is done."""

    def take_back(self, blocks: list[Tensor]) -> None:
        device.synchronize(self.device)
        for block in blocks:
            block.fill_(0xFF)
        super().take_back(blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened(make_base("llama", tmp_path_factory.mktemp("wide"), overrides=SHAPE)).to(device.current())


def step(model: Any, inputs: Inputs, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one micro-batch, in one order of sums."""
    causal_lm = model.get_base_model()
    set_gradient_checkpointing(causal_lm, True, keep_random_state=True, inputs=inputs)
    model.zero_grad()
    torch.manual_seed(5)
    forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0)
    return {name: one.grad.clone() for name, one in adapters.trainable(model).items()}


def batch_of(model: Any, length: int) -> Batch:
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    return real_batch(Workload(1, length), vocabulary).to(device.current())


def test_the_same_bits_and_less_memory(model: Any) -> None:
    place, batch = device.current(), batch_of(model, LENGTH)
    layers = len(recomputable(model.get_base_model()))
    found, highest = [], []
    host = OnHost(Poisoned(place), layers, layers)
    with torch.random.fork_rng(devices=[place]):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for inputs in (ON_DEVICE, host, host, ON_DEVICE):
                device.release(place)
                found.append(step(model, inputs, batch))
                highest.append(device.peak_bytes(place) or 0)
        finally:
            torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)
    an_input = LENGTH * SHAPE["hidden_size"] * 2  # type: ignore[operator]
    assert highest[0] - highest[2] >= (LAYERS - 4) * an_input
    assert host.pool.blocks == (LAYERS - 1) * -(-an_input // offload.BLOCK_BYTES)
    assert not host.pool.pageable and not host.pool.lent


def test_rows_of_other_widths_use_the_same_blocks(model: Any) -> None:
    place = device.current()
    layers = len(recomputable(model.get_base_model()))
    host = OnHost(Poisoned(place), layers, layers)
    step(model, host, batch_of(model, LENGTH))
    made = host.pool.blocks
    for length in (2048, LENGTH, 3072):
        here, away = (step(model, inputs, batch_of(model, length)) for inputs in (ON_DEVICE, host))
        assert all(torch.allclose(here[name], away[name], rtol=1e-2, atol=1e-3) for name in here)
    assert host.pool.blocks == made


def test_copies_hide_behind_computing(model: Any) -> None:
    """Median of ten steps each, in turns; before them two that warm up."""
    place, batch = device.current(), batch_of(model, LENGTH)
    layers = len(recomputable(model.get_base_model()))
    kinds: dict[str, Inputs] = {"device": ON_DEVICE, "host": OnHost(Pool(place), layers, layers)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(12):
        for name, inputs in kinds.items():
            device.synchronize(place)
            began = time.perf_counter()
            step(model, inputs, batch)
            device.synchronize(place)
            seconds[name].append(time.perf_counter() - began)
    here, away = (sorted(seconds[name][2:])[5] for name in ("device", "host"))
    assert away <= (1 + MOST_STALL) * here, (
        f"{here * 1e3:.1f} ms with inputs on the device, {away * 1e3:.1f} on the host"
    )
