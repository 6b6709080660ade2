"""What a run reports of where tokens go: counted here once more, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.events import Routed
from qlora.model import adapters, routing
from qlora.model.family_facts import two_documents
from qlora.model.mixtures import experts_in
from qlora.recipe.sections import LoraSection
from qlora.step.forward import CausalParts, evaluating
from tests import runs
from tests.families import make_config as make_dense
from tests.families import make_model
from tests.mixtures import make_base, make_config

EXPERTS, CHOICES = 8, 2


def batch() -> Any:
    """Two documents and padding; the first document is not trained."""
    made = two_documents((11, 13, 3))
    ids = torch.randint(4, 380, made.input_ids_BS.shape, generator=torch.Generator().manual_seed(0))
    return replace(made, input_ids_BS=ids, trained_T=torch.arange(11, 24))


def tuned(config: Any, moved: bool) -> Any:
    model = adapters.attach(make_model(config).requires_grad_(False), LoraSection(r=4), 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapters.trainable(model).items():
        if moved and "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def seen(model: Any) -> list[Tensor]:
    """The sets of experts of each trained token, layer by layer, by hooks of the test's own."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, __: found.append(inputs[1]))
        for _, module in experts_in(model.get_base_model())
    ]
    with torch.no_grad():
        at = batch()
        CausalParts.of(model.get_base_model()).trunk(
            input_ids=at.input_ids_BS, position_ids=at.position_ids_BS, attention_mask=None, use_cache=False
        )
    for handle in handles:
        handle.remove()
    return [index[11:24] for index in found]


@pytest.mark.parametrize("moved", [False, True])
def test_shares_are_those_that_are_counted(moved: bool) -> None:
    model = tuned(make_config("qwen3_moe"), moved)
    with evaluating(model):
        layers = routing.compared(model, CausalParts.of(model.get_base_model()), batch)
        with model.disable_adapter():
            untuned = seen(model)
        now = seen(model)
    assert len(layers) == 2
    for layer, before, after in zip(layers, untuned, now, strict=True):
        counts = [int((after == expert).sum()) for expert in range(EXPERTS)]
        assert layer.hit == pytest.approx(sum(count > 0 for count in counts) / EXPERTS)
        assert layer.largest == pytest.approx(max(counts) / (13 * CHOICES))
        pairs = zip(before.tolist(), after.tolist(), strict=True)
        changed = sum(set(one) != set(other) for one, other in pairs)
        assert layer.changed == pytest.approx(changed / 13)
    assert (max(layer.changed for layer in layers) > 0) is moved


def test_a_dense_model_has_none_and_is_not_computed() -> None:
    model = tuned(make_dense("qwen3"), True)
    assert routing.compared(model, CausalParts.of(model.get_base_model()), lambda: pytest.fail("asked")) == []


def test_a_run_reports_each_evaluation(tmp_path: Path) -> None:
    """Untuned first, where nothing has changed; a dense run says nothing of experts."""
    keys = ("train.max_steps=2", "eval.every_steps=1", "eval.samples=0", "data.max_length=96", "data.eval_fraction=0.2")
    sink = runs.train(runs.write_recipe(tmp_path, make_base("qwen3_moe", tmp_path / "base")), *keys)
    events = [event for event in sink.events if isinstance(event, Routed)]
    assert [event.step for event in events] == [0, 1, 2]
    assert events[0].changed == (0.0, 0.0) and all(len(event.hit) == len(event.largest) == 2 for event in events)
    assert all(0 < share <= 1 for event in events for share in (*event.hit, *event.largest))
