"""What a model held is given back while the model itself is still held, and the next one can be loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qlora.model.base_folder import BaseFolder
from qlora.model.emptied import empty
from tests.model.conftest import load


def test_no_storage_is_left_and_the_next_model_is_whole(base_of: Callable[[str], BaseFolder]) -> None:
    model = load(base_of("llama"))
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    assert states and all(state.absmax.numel() for state in states)
    empty(model)
    assert not any(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
    assert not any(state.absmax.numel() or state.offset.numel() or state.state2.absmax.numel() for state in states)
    logits = load(base_of("llama"))(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert bool(torch.isfinite(logits).all())
