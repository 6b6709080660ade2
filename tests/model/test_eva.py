"""EVA's start: directions of what layers are given, from trained positions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora.batch import Batch
from qlora.errors import ModelError
from qlora.model import eva
from qlora.model.adapters import attach, trainable
from qlora.model.base_folder import BaseFolder
from qlora.recipe.sections import LoraSection
from tests.model.conftest import load, logits

INPUT_IDS = torch.arange(5, 45)[None]
BaseOf = Callable[[str], BaseFolder]


def test_eva_starts_from_the_inputs_of_trained_positions(base_of: BaseOf) -> None:
    """A's rows are orthonormal directions of the layer's inputs, the base is untouched, and step 0 is still nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 12, (2, 32), generator=generator)  # few tokens: inputs with clear directions
    weights = torch.ones(2, 32)
    weights[:, :8] = 0
    positions = torch.arange(32).expand(2, -1)
    batch = Batch(ids, positions, torch.zeros_like(ids), ids, weights, weights.flatten().nonzero().flatten())
    model = load(base_of("llama"))
    before = logits(model, INPUT_IDS)
    lora = LoraSection(r=2, init="eva", target_modules=("q_proj", "down_proj"))
    asked_head: list[Any] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: asked_head.append(1))
    model = attach(model, lora, seed=1, eva_batches=[batch])
    handle.remove()
    assert not asked_head  # all positions' logits: more than a step takes
    assert torch.equal(logits(model, INPUT_IDS), before)
    for name, parameter in trainable(model).items():
        assert parameter.dtype == torch.bfloat16 and parameter.shape[0 if "lora_A" in name else 1] == 2
        if "lora_A" in name:
            product = parameter.float() @ parameter.float().T
            assert torch.allclose(product, torch.eye(2), atol=0.02), name
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model, ids)
    handle.remove()
    inputs = seen[0][weights > 0].float()
    _, _, directions = torch.linalg.svd(inputs - inputs.mean(dim=0), full_matrices=False)
    alignment = torch.linalg.svdvals(layer.lora_A["default"].weight.detach().float() @ directions[:2].T)
    assert alignment.min() > 0.95


def test_what_never_settles_is_given_up(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "EVA_MAX_FORWARDS", 0)
    ids = torch.arange(4, 36)[None]
    batch = Batch(ids, torch.arange(32)[None], torch.zeros_like(ids), ids, torch.ones(1, 32), torch.arange(32))
    with pytest.raises(ModelError, match="has not converged after 0 passes") as refusal:
        attach(load(base_of("llama")), LoraSection(r=2, init="eva"), seed=1, eva_batches=[batch])
    assert refusal.value.hint
