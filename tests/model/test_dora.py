"""DoRA's norms are peft's to the last bit, and no identity is made for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.model import adapters, dora
from qlora.model.cpu_matmul import fast_matmul
from qlora.recipe.sections import LoraSection
from tests.model.conftest import CPU, load
from tests.model.test_adapters import BaseOf

LORA = LoraSection(r=6, use_dora=True, use_rslora=True)
IDS = torch.arange(4, 44).view(2, 20)


def losses_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of a model whose B is not zero: its logits and every gradient."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapters.trainable(model).items():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
    with fast_matmul(CPU):
        logits = model(input_ids=IDS).logits
        logits.float().square().mean().backward()
    found = {name: parameter.grad for name, parameter in adapters.trainable(model).items()}
    assert all(gradient is not None for gradient in found.values())
    return {"logits": logits.detach(), **found}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_logits_and_gradients_are_pefts_bit_for_bit(
    base_of: BaseOf, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = losses_and_gradients(adapters.attach(load(base_of("llama"), kind), LORA, 1, dtype=dtype))
    monkeypatch.setattr(dora, "without_identity", lambda model: None)
    pefts = losses_and_gradients(adapters.attach(load(base_of("llama"), kind), LORA, 1, dtype=dtype))
    assert ours.keys() == pefts.keys()
    assert [name for name in pefts if not torch.equal(ours[name], pefts[name])] == []


class Identities(TorchDispatchMode):
    """How many identity matrices are made."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("aten::eye")
        return func(*args, **(kwargs or {}))


def test_no_identity_is_made_in_a_forward_pass(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a layer's input wide: 411 MB for 14,336, in every layer's every pass."""
    counts = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(dora, "without_identity", lambda model: None)
        model = adapters.attach(load(base_of("llama")), LORA, 1)
        with Identities() as seen, torch.no_grad():
            model(input_ids=IDS)
        counts.append(seen.count)
    assert counts[0] == 0 and counts[1] == 14
