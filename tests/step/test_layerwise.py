"""A layer that is recomputed gives the very bits that a layer gives whose tensors are all kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.layer_partners import Resident
from qlora.memory.simulation import Workload
from qlora.model import adapters
from qlora.model.cpu_matmul import fast_matmul
from qlora.step import layerwise
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch
from qlora.step.layerwise import RunLayer, set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.families import FAMILIES, GEMMA3N, make_base
from tests.memory.counted import real_batch
from tests.step.opened import CPU, LORA, opened


def gradients(model: Any, layers: bool | int, alpha: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of two micro-batches, of packed rows and with dropout."""
    causal_lm = model.get_base_model()
    set_gradient_checkpointing(causal_lm, layers, keep_random_state=True)
    model.zero_grad()
    losses = []
    with fast_matmul(CPU):
        for micro_step, length in enumerate((40, 24)):
            seed_micro_batch(7, 3, micro_step)
            batch = real_batch(Workload(2, length), causal_lm.config.get_text_config().vocab_size)
            losses.append(forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0, alpha))
    found = {name: parameter.grad.clone() for name, parameter in adapters.trainable(model).items()}
    return torch.stack(losses), found


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_bits(family: str, tmp_path: Path) -> None:
    model = opened(make_base(family, tmp_path, overrides={"num_hidden_layers": 3, "layer_types": None}))
    loss, kept = gradients(model, False)
    for layers in (1, 2, True):
        again, found = gradients(model, layers)
        assert torch.equal(again, loss)
        assert all(torch.equal(found[name], kept[name]) for name in kept), layers
    assert any(bool(gradient.any()) for gradient in kept.values())


def count_runs(patch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The layers that are run by us, and by torch's function."""
    ours: list[str] = []
    torchs: list[str] = []
    apply, checkpoint = RunLayer.apply, layerwise.checkpoint
    patch.setattr(RunLayer, "apply", lambda *inputs: ours.append("") or apply(*inputs))
    patch.setattr(layerwise, "checkpoint", lambda *about, **how: torchs.append("") or checkpoint(*about, **how))
    return ours, torchs


def test_the_first_layers_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 3}))
    ours, torchs = count_runs(monkeypatch)
    for layers, runs in ((False, 0), (1, 2), (2, 4), (True, 6), (9, 6)):
        gradients(model, layers)
        assert (len(ours), len(torchs)) == (runs, 0), layers
        ours.clear()
        flags = [layer.gradient_checkpointing for layer in layerwise.recomputable(model.get_base_model())]
        assert flags == [number < runs // 2 for number in range(3)]


def test_layers_that_share_keys_and_values_are_recomputed_in_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer above reads what the one below has computed, and goes back to it."""
    model = opened(make_base("gemma3n_text", tmp_path, overrides=GEMMA3N), LORA.model_copy(update={"dropout": 0.0}))
    loss, kept = gradients(model, False)
    ours, torchs = count_runs(monkeypatch)
    again, found = gradients(model, True)
    assert torch.equal(again, loss) and all(torch.equal(found[name], kept[name]) for name in kept)
    assert torchs and not ours


def test_a_layer_of_no_number_is_not_run_with_weights_that_are_elsewhere() -> None:
    class Elsewhere(Resident):
        """Says nothing of layers, and is not `RESIDENT`."""

    run, hidden = layerwise._Recomputed(False, weights=Elsewhere()), torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ModelError, match="not among those whose weights are streamed"):
        run(partial(Pair.forward, Pair()), hidden, 1.0)


def test_a_layer_below_the_lowest_adapter_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LORA.model_copy(update={"target_modules": ("layers.2.self_attn.q_proj",)})
    model = opened(make_base("llama", tmp_path, overrides={"num_hidden_layers": 4}), lora)
    ours, torchs = count_runs(monkeypatch)
    _, found = gradients(model, True)
    assert (len(ours), len(torchs)) == (4, 0), "layers 2 and 3 of two micro-batches"
    assert len(found) == 2


def test_noise_on_the_embeddings_is_drawn_once(tmp_path: Path) -> None:
    model = opened(make_base("qwen3", tmp_path))
    loss, kept = gradients(model, False, alpha=5.0)
    again, found = gradients(model, True, alpha=5.0)
    assert torch.equal(again, loss) and all(torch.equal(found[name], kept[name]) for name in kept)


class Pair(nn.Module):
    """A layer of another form: a tuple of hidden states, a value of no gradient, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -2.0]))

    def forward(self, hidden: Tensor, scale: float, shift: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        product = nn.functional.dropout(hidden * self.weight * scale, 0.5)
        return product + hidden, product.detach(), None


def test_a_layer_may_give_a_tuple_and_draws_what_it_drew() -> None:
    layer, run = Pair(), layerwise._Recomputed(keep_random_state=True)
    hidden = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))

    def found(call: Any) -> list[Tensor]:
        torch.manual_seed(5)
        given, layer.weight.grad = hidden.clone().requires_grad_(), None
        output, beside, nothing = call(given)
        assert nothing is None
        after = torch.rand(2)
        (output.sum() * 3).backward()
        assert given.grad is not None and layer.weight.grad is not None
        return [output.detach(), beside.detach(), given.grad, layer.weight.grad, after, torch.rand(2)]

    plain = found(lambda given: layer(given, 2.0))
    again = found(lambda given: run(partial(Pair.forward, layer), given, 2.0))
    assert all(map(torch.equal, plain, again))


def test_what_has_a_gradient_beside_hidden_states_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, run = Pair(), layerwise._Recomputed(keep_random_state=False)
    ours, torchs = count_runs(monkeypatch)
    hidden, shift = torch.ones(3, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    run(partial(Pair.forward, layer, shift=shift), hidden, 1.0)
    run(partial(Pair.forward, layer, shift={"shared": shift}), hidden, 1.0)
    run(partial(Pair.forward, layer, shift=(shift.detach(), None, 2)), hidden, 1.0)
    assert (len(ours), len(torchs)) == (1, 2)
