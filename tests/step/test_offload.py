"""Inputs that wait on the host: the same bits, which blocks they lie in, and when they come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.layer_partners import ON_DEVICE
from qlora.memory.simulation import Workload
from qlora.model import adapters
from qlora.model.cpu_matmul import fast_matmul
from qlora.step import layerwise, offload
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch
from qlora.step.loss import SupervisedObjective
from qlora.step.offload import Away, OnHost, Pool
from tests.card import Card, rehearsal
from tests.families import FAMILIES, GEMMA3N, make_base
from tests.memory.counted import real_batch
from tests.step.opened import LORA, opened

CPU = torch.device("cpu")
POISON = 0xFF  # in bf16 and fp32: not a number


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input is moved, and lies in several blocks."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(offload, "BLOCK_BYTES", 1024)


class Poisoned(Pool):
    """What comes back holds no number any more."""

    def take_back(self, blocks: list[Tensor]) -> None:
        for block in blocks:
            block.fill_(POISON)
        super().take_back(blocks)


class Noted(OnHost):
    """Writes down what is asked of it."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.said: list[str] = []

    def keep(self, layer: int, x: Tensor) -> Any:
        self.said.append(f"keep {layer}")
        ticket = super().keep(layer, x)
        if isinstance(ticket, Away):
            ticket.layer = layer  # type: ignore[attr-defined]
        return ticket

    def give(self, ticket: Any) -> Tensor:
        self.said.append(f"give {getattr(ticket, 'layer', 'top')}")
        return super().give(ticket)

    def _ask_for(self, ticket: Away) -> None:
        if ticket.flight.tensor is None:
            self.said.append(f"ask {ticket.layer}")  # type: ignore[attr-defined]
        super()._ask_for(ticket)


def gradients(
    model: Any, layers: bool | int, inputs: Any, alpha: float = 0.0, lengths: tuple[int, ...] = (40, 24)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of micro-batches of packed rows of several widths, with dropout."""
    causal_lm = model.get_base_model()
    layerwise.set_gradient_checkpointing(causal_lm, layers, keep_random_state=True, inputs=inputs)
    model.zero_grad()
    losses = []
    with fast_matmul(CPU):
        for micro_step, length in enumerate(lengths):
            seed_micro_batch(7, 3, micro_step)
            batch = real_batch(Workload(2, length), causal_lm.config.get_text_config().vocab_size)
            losses.append(forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0, alpha))
    return torch.stack(losses), {name: one.grad.clone() for name, one in adapters.trainable(model).items()}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    equal = all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    return torch.equal(one[0], other[0]) and equal and any(bool(value.any()) for value in one[1].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_on_the_device(family: str, tmp_path: Path) -> None:
    model = opened(make_base(family, tmp_path, overrides={"num_hidden_layers": 3, "layer_types": None}))
    kept = gradients(model, True, ON_DEVICE, alpha=5.0)
    for layers in (True, 1, 2):
        inputs = OnHost(Poisoned(CPU), 3 if layers is True else layers, 3)
        assert same(gradients(model, layers, inputs, alpha=5.0), kept), layers
        assert inputs.pool.blocks and not inputs.pool.lent


def test_what_is_asked_and_when(tmp_path: Path) -> None:
    """The top layer's input stays; each one is asked for while the layer above it is gone back through."""
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}))
    inputs = Noted(Poisoned(CPU), 4, 4)
    gradients(model, True, inputs, lengths=(40,))
    up = ["keep 0", "keep 1", "keep 2", "keep 3"]
    down = ["give top", "ask 2", "give 2", "ask 1", "give 1", "ask 0", "give 0"]
    assert inputs.said == up + down
    part = Noted(Poisoned(CPU), 2, 4)
    gradients(model, 2, part, lengths=(40,))
    assert part.said == ["keep 0", "keep 1", "give 1", "ask 1", "ask 0", "give 0"]


def test_blocks_are_made_once_and_serve_every_width(tmp_path: Path) -> None:
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}))
    inputs = OnHost(Poisoned(CPU), 4, 4)
    gradients(model, True, inputs, lengths=(40,))
    width = model.get_base_model().config.hidden_size
    a_layer = -(-2 * 40 * width * 2 // offload.BLOCK_BYTES)
    assert inputs.pool.blocks == 3 * a_layer > 3
    for _ in range(3):
        gradients(model, True, inputs, lengths=(8, 24, 40, 16))
    assert inputs.pool.blocks == 3 * a_layer and not inputs.pool.lent
    gradients(model, True, inputs, lengths=(56,))
    assert inputs.pool.blocks == 3 * -(-2 * 56 * width * 2 // offload.BLOCK_BYTES)


def test_a_small_input_and_one_that_lies_apart_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = OnHost(Pool(CPU), 4, 4)
    apart = torch.randn(8, 6).t()
    assert inputs.give(inputs.keep(0, apart)).data_ptr() == apart.data_ptr()
    whole = torch.randn(6, 8)
    monkeypatch.setattr(offload, "SMALLEST_BYTES", whole.nbytes + 1)
    assert inputs.give(inputs.keep(0, whole)).data_ptr() == whole.data_ptr()
    monkeypatch.setattr(offload, "SMALLEST_BYTES", whole.nbytes)
    ticket = inputs.keep(0, whole)
    assert isinstance(ticket, Away) and torch.equal(inputs.give(ticket), whole)
    assert inputs.give(inputs.keep(3, whole)).data_ptr() == whole.data_ptr(), "the top layer's"


def test_layers_that_share_keys_go_to_the_host_as_well(tmp_path: Path) -> None:
    """torch's checkpoint follows their graph: what it saves of their input is what is moved."""
    lora = LORA.model_copy(update={"dropout": 0.0})
    model = opened(make_base("gemma3n_text", tmp_path, overrides=GEMMA3N), lora)
    kept = gradients(model, False, ON_DEVICE)
    inputs = Noted(Poisoned(CPU), 4, 4)
    assert same(gradients(model, True, inputs), kept)
    assert inputs.pool.blocks and not inputs.pool.lent
    assert inputs.said[:4] == ["keep 0", "keep 1", "keep 2", "keep 3"] and "give 0" in inputs.said


def test_what_a_failed_pass_left_gives_its_blocks_back(tmp_path: Path) -> None:
    """Forward or backward, in any layer: no block is lost, none more is made, and the next pass has the same bits."""
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}))
    inputs = OnHost(Poisoned(CPU), 4, 4)
    kept = gradients(model, True, inputs)
    made = inputs.pool.blocks
    for at in range(8):
        with pytest.raises(MemoryError):
            fail_at(model, at, lambda: gradients(model, True, inputs))
        gc.collect()
        assert not inputs.pool.lent, at
        assert same(gradients(model, True, inputs), kept) and inputs.pool.blocks == made


def fail_at(model: Any, at: int, work: Callable[[], Any]) -> None:
    """The call of a layer of that number ends with an error."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise MemoryError

    layers = layerwise.recomputable(model.get_base_model())
    hooks = [layer.self_attn.register_forward_pre_hook(count) for layer in layers]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()


def test_a_layer_that_changes_its_input_is_an_error() -> None:
    inputs = OnHost(Pool(CPU), 3, 4)
    x = torch.randn(4, 4)
    inputs.keep(0, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="in its place"):
        inputs.keep(1, torch.randn(4, 4))


def test_so_is_one_that_changes_an_input_that_stays() -> None:
    inputs = OnHost(Pool(CPU), 4, 4)
    x = torch.randn(4, 4)
    ticket = inputs.keep(3, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="in its place"):
        inputs.give(ticket)


def test_on_a_card_copies_wait_for_computing_and_computing_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}))
    kept = gradients(model, True, ON_DEVICE, lengths=(40,))
    with rehearsal(monkeypatch, Card()) as card:
        inputs = OnHost(Poisoned(CPU), 4, 4)
        assert same(gradients(model, True, inputs, lengths=(40,)), kept)
        assert card.calls["pin_memory"] == inputs.pool.blocks and not inputs.pool.pageable
        # Three inputs go and come back: for each of the six copies the copies' stream waits for what was computed, and
        # the computing stream for the copy.
        assert card.calls["Stream.wait_stream"] == card.calls["Event.record"] == card.calls["Stream.wait_event"] == 6
        assert not card.calls["synchronize"] and not card.calls["record_stream"]


def test_where_the_system_pins_no_more_the_rest_is_pageable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}))
    kept = gradients(model, True, ON_DEVICE)
    with rehearsal(monkeypatch, Card()) as card:
        pin = Tensor.pin_memory

        def some(tensor: Tensor, *place: Any) -> Tensor:
            if card.calls["pin_memory"] >= 5:
                raise RuntimeError("CUDA error: out of memory")
            return pin(tensor, *place)

        monkeypatch.setattr(Tensor, "pin_memory", some)
        inputs = OnHost(Poisoned(CPU), 4, 4)
        assert same(gradients(model, True, inputs), kept)
        assert inputs.pool.pageable == inputs.pool.blocks - 5


def test_what_a_person_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 2 << 20)
    monkeypatch.setattr(offload, "BLOCK_BYTES", 4 << 20)
    none, host = Pool(CPU), Pool(CPU)
    assert none.said == "memory.offload_activations: no layer's input takes 2 MiB, all stay on the device"
    host.take_back(host.lend(9 << 20))
    assert host.said.startswith("inputs of recomputed layers wait on the host, in 12 MiB: without a GPU")
    with rehearsal(monkeypatch, Card()):
        card = Pool(CPU)
        card.take_back(card.lend(9 << 20))
        assert card.said == "inputs of recomputed layers wait on the host, in 12 MiB"
        card.pageable = 1
        assert card.said.endswith("; 4 MiB of them could not be pinned, whose copies wait")


def test_who_holds_inputs() -> None:
    pool = Pool(CPU)
    assert offload.held_by(pool, False, 4) is ON_DEVICE
    for moved, last in ((True, 3), (1, 0), (9, 3)):
        held = offload.held_by(pool, moved, 4)
        assert isinstance(held, OnHost) and (held.last, held.top) == (last, 3)
